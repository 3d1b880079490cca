"""Merge patch series into files that are not the released ones, hunk by hunk; each conflict is named.

A hunk fits where git merges it, with the released file as the base; or where all its old lines, context included,
are in the file exactly once. There is no fuzz: a hunk whose lines are nowhere, or in two places, is a conflict.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email import message_from_string, policy
from email.message import EmailMessage
from email.utils import parseaddr
from textwrap import wrap

from r3_adapter.errors import PatchError
from r3_adapter.patch.git import merge_file
from r3_adapter.patch.patchfile import FileDiff, Hunk, Patch, apply_diff, split_lines
from r3_adapter.patch.series import Contents


@dataclass(frozen=True)
class Conflict:
    """A hunk that does not fit.

    hunk: its number and its `@@` line. detail: what was found. reason: the patch's subject and why it is needed.
    """

    patch: str
    path: str
    hunk: str
    detail: str
    reason: str

    def __str__(self) -> str:
        """Return where it is and what was found, in a line."""
        return f"{self.path}: {self.hunk}: {self.detail}"


@dataclass
class Fit:
    """How a series fits.

    steps: what each patch makes of the files that it changes, by upstream path; nothing for one that is there already.
    hunks: how many there are, and `fitting` how many fit, in files that upstream has.
    """

    steps: list[tuple[Patch, Contents]] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)
    hunks: int = 0
    fitting: int = 0

    def __str__(self) -> str:
        """Return the count."""
        return f"{self.fitting} of {self.hunks} hunks fit"


def paths_of(patches: Sequence[Patch]) -> list[str]:
    """Return the upstream paths that patches touch."""
    return sorted({diff.path for patch in patches for diff in patch.diffs})


def fit(patches: Sequence[Patch], files: Mapping[str, bytes | None], base: Mapping[str, bytes | None]) -> Fit:
    """Merge patches in order; those after a conflict are merged with what fits of the ones before.

    files: the tree's bytes of all paths that the patches touch, by upstream path; None for no file.
    base: the same of the release that the patches are for, as far as they are to be had.
    """
    now, was, result, added = dict(files), dict(base), Fit(), set[str]()
    for patch in patches:
        step: Contents = {}
        for diff in patch.diffs:
            if diff.creates:
                added.add(diff.path)
                was[diff.path] = None
            merged, wrong = _merge(diff, now[diff.path], was.get(diff.path), diff.path in was)
            count = 0 if diff.path in added else len(diff.hunks)
            result.hunks, result.fitting = result.hunks + count, result.fitting + count - (len(wrong) if count else 0)
            why = explain(patch)
            result.conflicts += [
                Conflict(patch.name, diff.path, _title(hunk, diff), detail, why) for hunk, detail in wrong
            ]
            if merged != now[diff.path]:
                now[diff.path] = step[diff.path] = merged
            if diff.path in was:
                was[diff.path] = apply_diff(diff, was[diff.path])
        result.steps.append((patch, step))
    return result


def show(conflicts: Sequence[Conflict]) -> str:
    """Return the conflicts patch by patch, each with the patch's reason."""
    lines = []
    for patch in dict.fromkeys(conflict.patch for conflict in conflicts):
        here = [conflict for conflict in conflicts if conflict.patch == patch]
        lines += [f"{patch}:", *(f"    {conflict}" for conflict in here)]
        lines += wrap(here[0].reason, 110, initial_indent="    why: ", subsequent_indent="    ")
    return "\n".join(lines)


def explain(patch: Patch) -> str:
    """Return a patch's subject and the first paragraph of why it is needed."""
    subject, why = message_of(patch).split("\n\n")[:2]
    return f"{subject}: {' '.join(why.split())}"


def message_of(patch: Patch) -> str:
    """Return what a commit of the patch says: subject, reason and trailers, without what is of mail alone."""
    mail, (first, _, rest) = _mail(patch), patch.header.strip().partition("\n")
    subject, text = (str(mail["Subject"]), str(mail.get_payload())) if mail else (first, rest)
    subject = re.sub(r"^\[[^]]*\] *", "", subject)
    body = re.split(r"^---$", text, maxsplit=1, flags=re.MULTILINE)[0]
    return f"{subject}\n\n{body.strip()}\n"


def author_of(patch: Patch) -> tuple[str, str, str]:
    """Return name, address and date of a patch's author; empty where its header does not say."""
    mail = _mail(patch)
    return (*parseaddr(str(mail["From"])), str(mail["Date"] or "")) if mail else ("", "", "")


def _mail(patch: Patch) -> EmailMessage | None:
    """Return the header as mail, which is what `git format-patch` writes."""
    found = message_from_string(patch.header, policy=policy.default)
    return found if isinstance(found, EmailMessage) and found["Subject"] and found["From"] else None


def _merge(
    diff: FileDiff, ours: bytes | None, base: bytes | None, known: bool
) -> tuple[bytes | None, list[tuple[Hunk, str]]]:
    """Return what becomes of a file, and the hunks that do not fit with what was found.

    known: whether `base` is what the patch was made on.
    """
    if diff.creates or diff.deletes or ours is None:
        return _merge_whole(diff, ours, base, known)
    if known and base is not None:
        theirs = apply_diff(diff, base)
        assert theirs is not None
        merged = merge_file(ours, base, theirs)
        if merged is not None:
            return merged, []
    wrong = []
    for hunk in diff.hunks:
        merged = None
        if known and base is not None:
            theirs = _with_hunk(base, hunk, diff)
            merged = merge_file(ours, base, theirs)
        detail = ""
        if merged is None:
            merged, detail = _at_its_context(ours, hunk)
        if merged is None:
            wrong.append((hunk, detail))
        else:
            ours = merged
    return ours, wrong


def _merge_whole(
    diff: FileDiff, ours: bytes | None, base: bytes | None, known: bool
) -> tuple[bytes | None, list[tuple[Hunk, str]]]:
    """Merge a diff that makes or removes its file, or that finds none."""
    if diff.creates:
        theirs = apply_diff(diff, None)
        if ours in (None, theirs):
            return theirs, []
        detail = "the patch adds this file, and another one is there"
    elif ours is None:
        if diff.deletes:
            return None, []
        detail = "the file is not there"
    else:
        if known and ours == base:
            return None, []
        if not known:
            try:
                return apply_diff(diff, ours), []
            except PatchError:
                pass
        detail = "the patch removes this file, and it differs from the released one"
    return ours, [(hunk, detail) for hunk in diff.hunks]


def _with_hunk(base: bytes, hunk: Hunk, diff: FileDiff) -> bytes:
    """Return a file with one hunk of a diff that fits it."""
    lines = split_lines(base)
    start = hunk.old_start - 1 if hunk.old else hunk.old_start
    if tuple(lines[start : start + len(hunk.old)]) != hunk.old:
        raise PatchError(f"{diff.place}:{hunk.old_start}: not made on this file")
    return b"".join([*lines[:start], *hunk.new, *lines[start + len(hunk.old) :]])


def _at_its_context(ours: bytes, hunk: Hunk) -> tuple[bytes | None, str]:
    """Return the file with a hunk at the one place that has its old lines; else None and what was found."""
    lines = split_lines(ours)
    places = _places(lines, hunk.old)
    # Of two runs of lines where one may be a part of the other, the longer one says whether the hunk is in the file.
    if _places(lines, hunk.new) and (not places or len(hunk.new) > len(hunk.old)):
        return ours, ""
    if len(places) == 1:
        start = places[0]
        return b"".join([*lines[:start], *hunk.new, *lines[start + len(hunk.old) :]]), ""
    if places:
        return None, f"its lines are in {len(places)} places: lines {', '.join(str(place + 1) for place in places)}"
    missing = sum(line not in lines for line in hunk.old)
    if missing:
        return None, f"{missing} of its {len(hunk.old)} old lines are not in the file"
    return None, f"its {len(hunk.old)} old lines are in the file, but not next to each other"


def _places(lines: Sequence[bytes], wanted: Sequence[bytes]) -> list[int]:
    """Return where a run of lines starts, however often; an empty run is nowhere."""
    if not wanted:
        return []
    firsts = [at for at, line in enumerate(lines) if line == wanted[0]]
    return [at for at in firsts if tuple(lines[at : at + len(wanted)]) == tuple(wanted)]


def _title(hunk: Hunk, diff: FileDiff) -> str:
    number = diff.hunks.index(hunk) + 1
    sides = f"@@ -{hunk.old_start},{len(hunk.old)} +{hunk.new_start},{len(hunk.new)} @@"
    return f"hunk {number} of {len(diff.hunks)}, {sides}"
