"""Read patch files as `git format-patch` writes them, and apply them strictly: no fuzz, no offset, byte for byte.

unidiff parses; bytes travel through it as latin-1, which maps each byte to one character and back.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from unidiff.errors import UnidiffParseError
from unidiff.patch import Hunk as ParsedHunk
from unidiff.patch import PatchedFile, PatchSet

from r3_adapter.errors import PatchError

TRAILERS = ("Origin", "Forwarded", "Applied-Upstream", "Last-Update")

# The mail signature that format-patch appends is a git version; a line of a hunk never starts with a digit.
_SIGNATURE = re.compile(rb"^-- \n\d[^\n]*\n\n?\Z", re.MULTILINE)
_GIT_LINES = re.compile(r"diff --git |index |new file mode 100644$|deleted file mode 100644$")


@dataclass(frozen=True)
class Hunk:
    """A run of lines and what replaces it; lines keep their ends, starts count from 1 as in the `@@` line."""

    old_start: int
    new_start: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]


@dataclass(frozen=True)
class FileDiff:
    """What one patch does to one file; `place` is "patch: path" for messages.

    added, removed: numbers of lines. blob: git's name of the file before, mostly shortened; empty where there is none.
    """

    place: str
    path: str
    creates: bool
    deletes: bool
    hunks: tuple[Hunk, ...]
    added: int
    removed: int
    blob: str = ""

    def inverse(self) -> "FileDiff":
        """Return the diff that undoes this one."""
        hunks = tuple(Hunk(h.new_start, h.old_start, h.new, h.old) for h in self.hunks)
        return replace(
            self,
            creates=self.deletes,
            deletes=self.creates,
            hunks=hunks,
            added=self.removed,
            removed=self.added,
            blob="",
        )


@dataclass(frozen=True)
class Patch:
    """A patch file: its header (all text before the first diff), its diffs, and the sha256 of the file."""

    name: str
    header: str
    diffs: tuple[FileDiff, ...]
    sha256: str


def read_patch(path: Path) -> Patch:
    """Parse a patch file.

    Raises:
        PatchError: The file is not a plain text diff in git's form, or holds a line that belongs to no hunk.
    """
    data = path.read_bytes()
    start = re.search(rb"^diff --git ", data, re.MULTILINE)
    if start is None:
        raise PatchError(f"{path.name}: holds no 'diff --git' line")
    body = split_lines(_SIGNATURE.sub(b"", data[start.start() :]))
    try:
        header = data[: start.start()].decode()
        files = PatchSet(line.decode("latin-1") for line in body)
    except (UnidiffParseError, UnicodeDecodeError) as error:
        raise PatchError(f"{path.name}: cannot be read as a patch: {error}") from error
    # unidiff passes over what it does not know; a miscounted hunk would lose lines without a word.
    known = sum(_count_lines(file) for file in files)
    if known != len(body):
        raise PatchError(f"{path.name}: {len(body)} lines of diff != {known} in its headers and hunks")
    diffs = tuple(_convert(path.name, file) for file in files)
    return Patch(path.name, header, diffs, hashlib.sha256(data).hexdigest())


def trailers(header: str) -> dict[str, str]:
    """Return the `Name: value` lines that close a header, in front of format-patch's `---` line."""
    message = re.split(r"^---$", header, maxsplit=1, flags=re.MULTILINE)[0].rstrip()
    last = message.rsplit("\n\n", 1)[-1]
    return dict(re.findall(r"^([A-Z][A-Za-z-]*): (\S.*)$", last, re.MULTILINE))


def apply_diff(diff: FileDiff, old: bytes | None) -> bytes | None:
    """Apply a diff to the bytes of a file; None stands for no file.

    Raises:
        PatchError: A context or removed line differs from the file's, or the file is there (or not) against the diff.
    """
    if (old is None) != diff.creates:
        raise PatchError(f"{diff.place}: the file {'does not exist' if old is None else 'exists already'}")
    lines, result, at = split_lines(old or b""), list[bytes](), 0
    for hunk in diff.hunks:
        # In a hunk without lines on one side git names the line in front of it.
        start = hunk.old_start - 1 if hunk.old else hunk.old_start
        if not at <= start <= len(lines):
            raise PatchError(f"{diff.place}:{hunk.old_start}: hunk overlaps or is beyond the {len(lines)} lines")
        _check_lines(diff, hunk, lines[start : start + len(hunk.old)], start)
        result += lines[at:start]
        if len(result) != (hunk.new_start - 1 if hunk.new else hunk.new_start):
            raise PatchError(f"{diff.place}: hunk says new line {hunk.new_start}, but it falls on {len(result) + 1}")
        result += hunk.new
        at = start + len(hunk.old)
    result += lines[at:]
    if not all(line.endswith(b"\n") for line in result[:-1]):
        raise PatchError(f"{diff.place}: a line without an end would come before the last line")
    if diff.deletes and result:
        raise PatchError(f"{diff.place}: deletes the file, but {len(result)} lines would be left")
    return None if diff.deletes else b"".join(result)


def split_lines(data: bytes) -> list[bytes]:
    r"""Split at b"\n" alone (bytes.splitlines also splits at b"\r"), keeping the ends."""
    return re.findall(rb"[^\n]*\n|[^\n]+", data)


def _check_lines(diff: FileDiff, hunk: Hunk, found: list[bytes], start: int) -> None:
    for i, want in enumerate(hunk.old):
        have = found[i] if i < len(found) else None
        if have != want:
            raise PatchError(f"{diff.place}:{start + i + 1}: the file has {have!r} != the patch's {want!r}")


def _count_lines(file: PatchedFile) -> int:
    headers = len(file.patch_info or ()) + (2 if file else 0)
    return headers + sum(1 + len(hunk) for hunk in file)


def _convert(name: str, file: PatchedFile) -> FileDiff:
    source, target = file.source_file, file.target_file
    creates, deletes = source == "/dev/null", target == "/dev/null"
    place = f"{name}: {file.path}"
    for line in file.patch_info or ():
        if not _GIT_LINES.match(line.rstrip("\n")):
            raise PatchError(f"{place}: only plain changes of text files are applied, not {line.strip()!r}")
    if not (creates or source.startswith("a/")) or not (deletes or target.startswith("b/")):
        raise PatchError(f"{place}: names must start with a/ and b/, not {source!r} and {target!r}")
    if not (creates or deletes) and (source[2:] != target[2:] or not file):
        raise PatchError(f"{place}: renames {source!r} to {target!r} or changes nothing")
    path = (target if creates else source)[2:]
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or str(pure) != path or "\\" in path:
        raise PatchError(f"{place}: not a plain relative path")
    hunks = tuple(_convert_hunk(place, hunk) for hunk in file)
    blob = re.search(r"^index ([0-9a-f]+)\.\.", "".join(file.patch_info or ()), re.MULTILINE)
    return FileDiff(
        place, path, creates, deletes, hunks, file.added, file.removed, blob[1] if blob and not creates else ""
    )


def _convert_hunk(place: str, hunk: ParsedHunk) -> Hunk:
    sides = [(kind, line.encode("latin-1")) for kind, line in _ended_lines(place, hunk)]
    old = tuple(line for kind, line in sides if kind in " -")
    new = tuple(line for kind, line in sides if kind in " +")
    if (len(old), len(new)) != (hunk.source_length, hunk.target_length):
        want = f"-{hunk.source_length} +{hunk.target_length}"
        raise PatchError(f"{place}:{hunk.source_start}: hunk holds -{len(old)} +{len(new)} lines != {want} announced")
    return Hunk(hunk.source_start, hunk.target_start, old, new)


def _ended_lines(place: str, hunk: ParsedHunk) -> Iterator[tuple[str, str]]:
    r"""Yield kind and text of each line, with the end taken off where a `\ No newline` line follows."""
    lines = list(hunk)
    for i, line in enumerate(lines):
        if line.line_type == "":
            raise PatchError(f"{place}: blank line after the hunk at {hunk.source_start}")
        if line.line_type == "\\":
            continue
        bare = i + 1 < len(lines) and lines[i + 1].line_type == "\\"
        yield line.line_type, line.value.removesuffix("\n") if bare else line.value
