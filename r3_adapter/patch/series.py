"""Patch series as they lie in `patches/`, and the lock that pins the files which they touch.

Nothing here looks at an installation: bytes come in, bytes go out.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from r3_adapter.errors import PatchError
from r3_adapter.patch.patchfile import TRAILERS, FileDiff, Patch, apply_diff, read_patch, trailers

ABSENT = "absent"
LOCK_NAME = "upstream.lock.toml"
SHARED = "shared"
SOURCE = "source"
"""A file beside the patches for a version that no registry has: the repository, and the commit that it is."""
TEST_FOLDERS = ("test/", "tests/")
_ENTRY = re.compile(r"(\.\./(?P<folder>[^./][^/]*)/)?(?P<name>[^./][^/]*\.patch)")
_LOCK_HEAD = "# The file hashes are written by `r3 patch lock`: sha256 before and after the whole series.\n"
_HASH = re.compile(rf"[0-9a-f]{{64}}|{ABSENT}")
_UTILITIES = "tests/unit_tests/test_utilities.py"
_ONE_PROCESS = """
import tempfile
from pathlib import Path

import torch
from megatron.core import parallel_state


class Utils:
    @staticmethod
    def initialize_model_parallel(*args, **kwargs):
        if not torch.distributed.is_initialized():
            method = f"file://{Path(tempfile.mkdtemp(), 'rendezvous')}"
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(backend, init_method=method, rank=0, world_size=1)
        parallel_state.initialize_model_parallel(*args, **kwargs)

    @staticmethod
    def destroy_model_parallel():
        parallel_state.destroy_model_parallel()
"""
"""Megatron-LM's tests take this from its repository, for several GPUs; this is for one process."""

Contents = dict[str, bytes | None]
"""Bytes of files by path; None stands for no file."""


@dataclass(frozen=True)
class Hashes:
    """The sha256 of a file before and after a series; ABSENT stands for no file."""

    before: str
    after: str


@dataclass(frozen=True)
class Series:
    """The patches for one version of a distribution, some of which lie in `shared` or in another version's folder.

    prefix: what upstream's repository has in front of the paths of an installation.
    package: the folder of an installation that patches may change.
    files: the hashes of each touched file, by its path in site-packages.
    """

    folder: Path
    distribution: str
    version: str
    prefix: str
    package: str
    files: Mapping[str, Hashes]

    @property
    def source(self) -> str:
        """The repository and the commit that a version which no registry has is of; empty for a release."""
        path = self.folder / SOURCE
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def patches_root() -> Path:
    """Return the folder of all series: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "patches"
    return shipped if shipped.is_dir() else package.parent / "patches"


def read_lock(root: Path) -> dict[str, dict[str, Any]]:
    """Return the lock's tables by distribution: {prefix, package, versions: {version: {path: {before, after}}}}.

    Raises:
        PatchError: The lock is missing or malformed.
    """
    path = root / LOCK_NAME
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        for name, table in tables.items():
            if not (isinstance(table["prefix"], str) and isinstance(table["package"], str)):
                raise TypeError(f"{name}: prefix and package must be strings")
            for version in table.setdefault("versions", {}):
                make_series(root, name, version, table)
    except OSError as error:
        raise PatchError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise PatchError(f"{path}: malformed: {error!r}") from error
    return tables


def write_lock(root: Path, tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the lock; a JSON string is a TOML string too."""
    lines = [_LOCK_HEAD]
    for name, table in sorted(tables.items()):
        lines += [f"[{json.dumps(name)}]", f"prefix = {json.dumps(table['prefix'])}"]
        lines += [f"package = {json.dumps(table['package'])}", ""]
        for version, files in sorted(table["versions"].items()):
            lines.append(f"[{json.dumps(name)}.versions.{json.dumps(version)}]")
            for path, pin in sorted(files.items()):
                lines.append(f'{json.dumps(path)} = {{ before = "{pin["before"]}", after = "{pin["after"]}" }}')
            lines.append("")
    (root / LOCK_NAME).write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8", newline="\n")


def load_series(root: Path | None = None) -> dict[str, tuple[Series, ...]]:
    """Return the pinned series of each distribution; a distribution may have several versions."""
    root = root or patches_root()
    tables = read_lock(root)
    return {
        name: tuple(make_series(root, name, version, table) for version in table["versions"])
        for name, table in tables.items()
    }


def make_series(root: Path, name: str, version: str, table: Mapping[str, Any]) -> Series:
    """Build a series from its distribution's table of the lock; a version without hashes yet has no files."""
    if version == SHARED:
        raise PatchError(f"{name} {version}: the folder of patches that versions share is no version")
    files = {path: Hashes(pin["before"], pin["after"]) for path, pin in table["versions"].get(version, {}).items()}
    for path, pin in files.items():
        if not (_HASH.fullmatch(pin.before) and _HASH.fullmatch(pin.after)) or pin.before == pin.after:
            raise PatchError(f"{LOCK_NAME}: {name} {version}: {path}: bad hashes {pin.before!r} -> {pin.after!r}")
        if not path.startswith(f"{table['package']}/") or ".." in path.split("/"):
            raise PatchError(f"{LOCK_NAME}: {name} {version}: {path} is not in package {table['package']!r}")
    return Series(root / name / version, name, version, table["prefix"], table["package"], files)


def listed(series: Series) -> list[Path]:
    """Return the patch files in the order that the `series` file gives.

    Raises:
        PatchError: There is no such file, it lists one twice or one that is missing, or leaves out one of its folder.
    """
    listing, beside = series.folder / "series", f"../{SHARED}/NAME.patch"
    if not listing.is_file():
        raise PatchError(f"{series.distribution} {series.version}: no file {listing}")
    entries = _entries(listing)
    matches = [_ENTRY.fullmatch(entry) for entry in entries]
    for entry, match in zip(entries, matches, strict=True):
        if match is None or match["folder"] == series.folder.name:
            raise PatchError(f"{listing}: {entry!r} is neither NAME.patch nor {beside} nor one of another version")
    found = [(match["folder"], match["name"]) for match in matches if match]
    names = [name for _, name in found]
    for name in names:
        if names.count(name) > 1:
            raise PatchError(f"{listing}: lists {name} {names.count(name)} times")
    own = sorted(name for folder, name in found if folder is None)
    there = sorted(path.name for path in series.folder.glob("*.patch"))
    if own != there:
        raise PatchError(f"{listing}: lists {own} != the folder's {there}")
    files = [series.folder.parent / (folder or series.folder.name) / name for folder, name in found]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise PatchError(f"{listing}: lists what is not there: {', '.join(missing)}")
    return files


def unlisted(folder: Path) -> list[Path]:
    """Return the shared patches of a distribution's folder that none of its series lists."""
    named = {entry for listing in folder.glob("*/series") for entry in _entries(listing)}
    shared = sorted((folder / SHARED).glob("*.patch"))
    return [path for path in shared if f"../{SHARED}/{path.name}" not in named]


def read_patches(series: Series) -> tuple[Patch, ...]:
    """Read the patches in the order that the `series` file gives.

    Raises:
        PatchError: One is missing, not listed or listed twice, lacks a trailer, or is shared and changes a file.
    """
    files = listed(series)
    patches = tuple(read_patch(path) for path in files)
    for path, patch in zip(files, patches, strict=True):
        missing = [name for name in TRAILERS if name not in trailers(patch.header)]
        if missing:
            raise PatchError(f"{patch.name}: header lacks the trailers {', '.join(missing)}")
        for diff in patch.diffs:
            if path.parent.name == SHARED and not diff.creates:
                raise PatchError(f"{diff.place}: a shared patch only adds files; this belongs in a version's folder")
    return patches


def site_path(series: Series, diff: FileDiff) -> str | None:
    """Return the path in site-packages of what a diff changes; None for an upstream test, which is not installed.

    Raises:
        PatchError: It is neither in the package nor a test, so applying the series would leave it out in silence.
    """
    path = diff.path.removeprefix(series.prefix)
    if diff.path.startswith(series.prefix) and path.startswith(f"{series.package}/"):
        return path
    if diff.path.startswith(TEST_FOLDERS):
        return None
    raise PatchError(f"{diff.place}: neither in {series.prefix}{series.package}/ nor in {' or '.join(TEST_FOLDERS)}")


def touched(series: Series, patches: Iterable[Patch]) -> list[str]:
    """Return the paths in site-packages that the patches touch, in order."""
    paths = (site_path(series, diff) for patch in patches for diff in patch.diffs)
    return sorted({path for path in paths if path is not None})


def patched(series: Series, patches: Iterable[Patch], contents: Mapping[str, bytes | None]) -> Contents:
    """Return the contents with all patches applied in order."""
    return _run(_installed(series, patches, contents), contents)


def unpatched(series: Series, patches: Iterable[Patch], contents: Mapping[str, bytes | None]) -> Contents:
    """Return the contents with all patches taken back, the last first, from those that are as patched."""
    diffs = _installed(series, patches, contents)
    done = {path for path, data in contents.items() if digest(data) == series.files[path].after}
    return _run([(path, diff.inverse()) for path, diff in reversed(diffs) if path in done], contents)


def upstream_tests(series: Series, patches: Iterable[Patch]) -> dict[str, bytes]:
    """Return the upstream tests that the patches bring, by upstream path.

    Raises:
        PatchError: A patch changes a test that no patch brought; wheels hold no tests, so its text is not known.
    """
    tests: Contents = {}
    for diff in (diff for patch in patches for diff in patch.diffs):
        if site_path(series, diff) is None:
            tests[diff.path] = apply_diff(diff, tests.get(diff.path))
    return {path: data for path, data in tests.items() if data is not None}


def write_upstream_tests(series: Series, folder: Path) -> list[Path]:
    """Write the upstream tests that the series brings below a folder, under their upstream paths; return the files."""
    return write_tests(series.distribution, upstream_tests(series, read_patches(series)), folder)


def write_tests(distribution: str, tests: Mapping[str, bytes], folder: Path) -> list[Path]:
    """Write upstream tests below a folder, and what these take from upstream's repository; return the tests.

    tests: by upstream path.
    """
    needed = {_UTILITIES: _ONE_PROCESS.encode()} if distribution == "megatron-core" else {}
    for path, data in (needed | dict(tests)).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return [folder / path for path in tests]


def parsed_version(text: str) -> Version | None:
    """Return what a text is as a version; None where it is none."""
    try:
        return Version(text)
    except InvalidVersion:
        return None


def is_release(version: str) -> bool:
    """Say whether a version is one that a registry may have as a release: no candidate, no build of a commit."""
    found = parsed_version(version)
    return found is not None and not found.is_prerelease and not found.local


def far(version: str, pin: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how far a pin is from a version, to be compared: part by part, then the newest first."""
    here, there = parsed_version(version), Version(pin)
    newest = tuple(-part for part in there.release)
    if here is None:
        return (), newest
    sides = [(*side.release, 0, 0, 0)[:3] for side in (here, there)]
    return tuple(abs(one - other) for one, other in zip(*sides, strict=True)), newest


def digest(data: bytes | None) -> str:
    """Return the sha256 as the lock writes it."""
    return ABSENT if data is None else hashlib.sha256(data).hexdigest()


def _entries(listing: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in listing.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def _installed(
    series: Series, patches: Iterable[Patch], contents: Mapping[str, bytes | None]
) -> list[tuple[str, FileDiff]]:
    """Return the diffs of installed files, each with its path in site-packages."""
    found = [(site_path(series, diff), diff) for patch in patches for diff in patch.diffs]
    for path, diff in found:
        if path is not None and path not in contents:
            raise PatchError(f"{diff.place}: not in {LOCK_NAME}; run `r3 patch lock`")
    return [(path, diff) for path, diff in found if path is not None]


def _run(diffs: Iterable[tuple[str, FileDiff]], contents: Mapping[str, bytes | None]) -> Contents:
    result = dict(contents)
    for path, diff in diffs:
        result[path] = apply_diff(diff, result[path])
    return result
