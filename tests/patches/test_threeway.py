"""Hunks are merged into files that are not the released ones: exactly, or each that does not fit is named."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from r3_adapter.patch.patchfile import Patch, read_patch
from r3_adapter.patch.threeway import Fit, author_of, fit, message_of, show

LINES = [f"line {number}\n" for number in range(40)]
PATH = "pkg/a.py"
MAIL = """From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: =?UTF-8?q?J=C3=BCrgen?=
 <one@there.example>
Date: Tue, 24 Nov 2026 07:56:47 +0000
Subject: [PATCH] area: Say what is changed here in a subject that is longer
 than a line

The first paragraph says
why.

The second one more.

Origin: vendor
---
 pkg/a.py | 2 +-

"""


def text(**changed: str) -> bytes:
    """The lines, some of them replaced: n3="..." replaces line 3."""
    return "".join(changed.get(f"n{number}", line) for number, line in enumerate(LINES)).encode()


@pytest.fixture
def make(diff_trees, tmp_path: Path):  # type: ignore[no-untyped-def]
    def patch(old: Mapping[str, bytes], new: Mapping[str, bytes], name: str = "0001-x.patch") -> Patch:
        path = tmp_path / name
        path.write_bytes(MAIL.encode() + diff_trees(old, new))
        return read_patch(path)

    return patch


def merged(found: Fit, path: str = PATH) -> bytes | None:
    result = None
    for _, step in found.steps:
        result = step.get(path, result)
    return result


TWICE = {"n5": "ours 5\n", "n30": "ours 30\n"}


@pytest.mark.parametrize("known", [True, False])
def test_changes_elsewhere_in_the_file_are_kept(make, known: bool) -> None:  # type: ignore[no-untyped-def]
    patch = make({PATH: text()}, {PATH: text(**TWICE)})
    tree = b"new first line\n" + text(n18="theirs\n")
    found = fit([patch], {PATH: tree}, {PATH: text()} if known else {})
    assert (found.conflicts, found.hunks, found.fitting) == ([], 2, 2)
    assert merged(found) == b"new first line\n" + text(n18="theirs\n", **TWICE)


@pytest.mark.parametrize("known", [True, False])
def test_a_change_of_the_same_line_is_a_conflict_and_the_other_hunk_fits(make, known: bool) -> None:  # type: ignore[no-untyped-def]
    patch = make({PATH: text()}, {PATH: text(**TWICE)})
    found = fit([patch], {PATH: text(n30="theirs\n")}, {PATH: text()} if known else {})
    (conflict,) = found.conflicts
    assert (conflict.patch, conflict.path, conflict.hunk) == (patch.name, PATH, "hunk 2 of 2, @@ -28,7 +28,7 @@")
    assert "1 of its 7 old lines are not in the file" in conflict.detail
    assert str(found) == "1 of 2 hunks fit"
    assert merged(found) == text(n5="ours 5\n", n30="theirs\n")
    assert "first paragraph says why." in show(found.conflicts) and "second" not in show(found.conflicts)


def test_a_change_beside_the_hunk_needs_the_base(make) -> None:  # type: ignore[no-untyped-def]
    patch, tree = make({PATH: text()}, {PATH: text(n5="ours\n")}), text(n7="theirs\n")
    assert merged(fit([patch], {PATH: tree}, {PATH: text()})) == text(n5="ours\n", n7="theirs\n")
    assert str(fit([patch], {PATH: tree}, {})) == "0 of 1 hunks fit"


def test_lines_that_are_twice_in_the_file_are_no_place(make) -> None:  # type: ignore[no-untyped-def]
    patch = make({PATH: text()}, {PATH: text(n5="ours\n")})
    (conflict,) = fit([patch], {PATH: text() + text()}, {}).conflicts
    assert conflict.detail == "its lines are in 2 places: lines 3, 43"


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "new", [text(n39="last\nmore\n"), text(n39="line 39\nmore\n"), text(n39="", n38=""), text(n5="")]
)
def test_what_is_there_already_is_not_done_twice(make, known: bool, new: bytes) -> None:  # type: ignore[no-untyped-def]
    patch, base = make({PATH: text()}, {PATH: new}), {PATH: text()} if known else {}
    assert merged(fit([patch], {PATH: text()}, base)) == new
    again = fit([patch], {PATH: new}, base)
    assert (again.steps, again.conflicts, again.fitting) == ([(patch, {})], [], 1)


def test_a_later_patch_builds_on_an_earlier_one(make) -> None:  # type: ignore[no-untyped-def]
    one = make({PATH: text()}, {PATH: text(n5="one\n"), "pkg/new.py": b"n = 1\n"}, "0001-x.patch")
    two = make(
        {PATH: text(n5="one\n"), "pkg/new.py": b"n = 1\n"},
        {PATH: text(n5="two\n"), "pkg/new.py": b"n = 2\n"},
        "0002-x.patch",
    )
    tree = {PATH: text(n20="theirs\n"), "pkg/new.py": None}
    found = fit([one, two], tree, {PATH: text()})
    assert found.conflicts == [] and [patch.name for patch, _ in found.steps] == ["0001-x.patch", "0002-x.patch"]
    assert (merged(found), merged(found, "pkg/new.py")) == (text(n5="two\n", n20="theirs\n"), b"n = 2\n")
    assert found.hunks == 2  # those of files that only the patches have always fit


def test_files_that_are_missing_or_in_the_way_are_conflicts(make) -> None:  # type: ignore[no-untyped-def]
    gone = {"pkg/gone.py": b"x = 1\n"}
    patch = make({PATH: text(), **gone}, {PATH: text(n5="ours\n"), "pkg/new.py": b"n = 1\n"})
    base = {PATH: text(), **gone}
    found = fit([patch], {PATH: None, "pkg/new.py": b"mine\n", "pkg/gone.py": b"x = 2\n"}, base)
    assert [(conflict.path, conflict.detail.split(",")[0]) for conflict in found.conflicts] == [
        (PATH, "the file is not there"),
        ("pkg/gone.py", "the patch removes this file"),
        ("pkg/new.py", "the patch adds this file"),
    ]
    assert found.steps == [(patch, {})]


def test_a_commit_says_what_the_patch_says(make) -> None:  # type: ignore[no-untyped-def]
    patch = make({PATH: text()}, {PATH: text(n5="ours\n")})
    assert message_of(patch) == (
        "area: Say what is changed here in a subject that is longer than a line\n\n"
        "The first paragraph says\nwhy.\n\nThe second one more.\n\nOrigin: vendor\n"
    )
    assert author_of(patch) == ("Jürgen", "one@there.example", "Tue, 24 Nov 2026 07:56:47 +0000")
