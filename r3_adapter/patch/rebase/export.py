"""Write the commits of a mended tree as the series of a release: its folder, and its entry in the lock."""

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from r3_adapter.errors import PatchError
from r3_adapter.patch.git import Repo
from r3_adapter.patch.patchfile import Patch, apply_diff, read_patch
from r3_adapter.patch.rebase.tree import changed_files, commits, origin_of, source_of, without_trailer
from r3_adapter.patch.series import (
    SHARED,
    SOURCE,
    Contents,
    Hashes,
    Series,
    digest,
    listed,
    make_series,
    patched,
    read_lock,
    read_patches,
    site_path,
    touched,
    upstream_tests,
    write_lock,
)

_DATE = re.compile(r"^(Last-Update: )\d{4}-\d\d-\d\d$", re.MULTILINE)
_NUMBERED = re.compile(r"(\d{4})-.+\.patch")


def write_series(repo: Repo, origin: Series, version: str, released: Contents) -> Series:
    """Write the commits on top of a release as its series, and pin it; return the series.

    A commit that still is what a shared patch is, is listed as that one. A shared patch that was mended is mended for
    all versions: only files that upstream lacks are in it.

    origin: the series that the commits come from.
    released: the release's files, by upstream path.

    Raises:
        PatchError: The commits make no series; nothing is written then.
    """
    root, name = origin.folder.parents[1], origin.distribution
    with tempfile.TemporaryDirectory(prefix="r3-patch-") as folder:
        scratch = Path(folder) / "patches"
        shutil.copytree(root / name, scratch / name)
        tables = read_lock(root)
        tables[name]["versions"].pop(version, None)
        series = make_series(scratch, name, version, tables[name])
        _write_patches(repo, origin, series)
        _keep_for_others(root / name, scratch / name, version)
        series = replace(series, files=_hashes(series, released, changed_files(repo)))
        versions = tables[name]["versions"]
        for other in versions:
            versions[other] = _locked_again(make_series(scratch, name, other, tables[name]))
        versions[version] = {path: {"before": pin.before, "after": pin.after} for path, pin in series.files.items()}
        shutil.rmtree(root / name)
        shutil.copytree(scratch / name, root / name)
        write_lock(root, tables)
    return replace(series, folder=root / name / version)


def _write_patches(repo: Repo, origin: Series, series: Series) -> None:
    """Write the patch files of a series, and mend shared ones."""
    known = {path.name: path for path in listed(origin)}
    commit_of_upstream = source_of(repo) or series.source
    shutil.rmtree(series.folder, ignore_errors=True)
    series.folder.mkdir()
    if commit_of_upstream:
        (series.folder / SOURCE).write_text(f"{commit_of_upstream}\n", encoding="utf-8")
    entries: list[str] = []
    free = max((_number(name) for name in known), default=0) + 1
    for commit in commits(repo):
        source = known.get(origin_of(repo, commit))
        number, free = (_number(source.name), free) if source else (free, free + 1)
        if entries and _number(Path(entries[-1]).name) >= number:
            raise PatchError(f"{commit[:12]} would be number {number:04}, after {entries[-1]}: put new commits last")
        made = _formatted(repo, commit, number, series.folder)
        same = source is not None and _same(read_patch(made), read_patch(source))
        if source and same and source.parent.name != series.version:
            made.unlink()
            entries.append(f"../{source.parent.name}/{source.name}")
            continue
        if source and same:
            # The bytes of the day that it was made, and of the git that made it.
            made.unlink()
            made = made.with_name(source.name)
            shutil.copyfile(source, made)
        else:
            made.write_text(_DATE.sub(rf"\g<1>{date.today()}", made.read_text(encoding="utf-8")), encoding="utf-8")
        if source and source.parent.name == SHARED:
            shared = series.folder.parent / SHARED
            (shared / source.name).unlink()
            entries.append(f"../{SHARED}/{made.name}")
            made.rename(shared / made.name)
        else:
            entries.append(made.name)
    (series.folder / "series").write_text("".join(f"{entry}\n" for entry in entries), encoding="utf-8")


def _keep_for_others(old: Path, new: Path, version: str) -> None:
    """Give other versions that list a patch of this one's folder their own copy, where it is not as it was."""
    for listing in sorted(new.glob("*/series")):
        for entry in listing.read_text(encoding="utf-8").split():
            name = entry.removeprefix(f"../{version}/")
            kept, now = old / version / name, new / version / name
            if name != entry and not (now.exists() and now.read_bytes() == kept.read_bytes()):
                shutil.copyfile(kept, listing.with_name(name))
                listing.write_text(listing.read_text(encoding="utf-8").replace(entry, name), encoding="utf-8")


def _formatted(repo: Repo, commit: str, number: int, folder: Path) -> Path:
    """Write a commit as git does, without the line that names its origin; return the file."""
    options = (
        "--no-numbered",
        "--no-renames",
        "--zero-commit",
        f"--start-number={number}",
        f"--output-directory={folder}",
    )
    path = Path(repo.line("format-patch", "-1", *options, commit))
    path.write_text(without_trailer(path.read_text(encoding="utf-8")), encoding="utf-8")
    return path


def _same(made: Patch, source: Patch) -> bool:
    """Say whether two patches have the same message and do the same in the same places."""
    messages = [re.split(r"^---$", patch.header, maxsplit=1, flags=re.MULTILINE)[0].split() for patch in (made, source)]
    subjects = [words[words.index("Subject:") :] if "Subject:" in words else words for words in messages]
    diffs = [[(diff.path, diff.creates, diff.deletes, diff.hunks) for diff in patch.diffs] for patch in (made, source)]
    return subjects[0] == subjects[1] and diffs[0] == diffs[1]


def _number(name: str) -> int:
    found = _NUMBERED.fullmatch(name)
    if not found:
        raise PatchError(f"{name}: its name does not start with a number of four digits")
    return int(found[1])


def _hashes(series: Series, released: Contents, wanted: Contents) -> dict[str, Hashes]:
    """Return the hashes of what the written series makes of the release, which must be what the tree has."""
    patches = read_patches(series)
    before = {path: released.get(series.prefix + path) for path in touched(series, patches)}
    after = patched(series, patches, before)
    made: Contents = {**{series.prefix + path: data for path, data in after.items()}, **upstream_tests(series, patches)}
    if differ := sorted(path for path in made | wanted if made.get(path) != wanted.get(path)):
        raise PatchError(f"{series.distribution} {series.version}: the patches do not give what the tree has: {differ}")
    return {path: Hashes(digest(before[path]), digest(after[path])) for path in before}


def _locked_again(series: Series) -> dict[str, dict[str, str]]:
    """Return a version's entry of the lock with the hashes of files that patches add as they are now."""
    if not (series.folder / "series").exists():
        return {path: {"before": pin.before, "after": pin.after} for path, pin in series.files.items()}
    added = _added(series, read_patches(series))
    kept: Mapping[str, Any] = {
        path: pin for path, pin in series.files.items() if path not in added and pin.before != digest(None)
    }
    hashes = {**kept, **{path: Hashes(digest(None), digest(data)) for path, data in added.items()}}
    return {path: {"before": pin.before, "after": pin.after} for path, pin in hashes.items()}


def _added(series: Series, patches: Sequence[Patch]) -> Contents:
    """Return the files of the installation that patches add, as the whole series makes them."""
    added: Contents = {}
    for diff in (diff for patch in patches for diff in patch.diffs):
        path = site_path(series, diff)
        if path is not None and (diff.creates or path in added):
            added[path] = apply_diff(diff, added.get(path))
    return added
