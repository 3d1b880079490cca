"""Patch files are read whole and applied strictly; git is the oracle."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r3_adapter.errors import PatchError
from r3_adapter.patch.patchfile import FileDiff, apply_diff, read_patch, trailers

DiffTrees = Callable[[Mapping[str, bytes], Mapping[str, bytes]], bytes]

# Texts that look like parts of a diff, ends of other systems, and characters at which str.splitlines would split.
LINES = [
    b"a",
    b"b",
    b"",
    b"a\r",
    b"\r",
    b"-- ",
    b"- ",
    b"-- a/x",
    b"++ b/x",
    b"\\ No newline at end of file",
    b"@@ -1 +1 @@",
]
LINES += [b"diff --git a/x b/x", b"\x0b", b"\xe2\x80\xa8", b"\xff\x85", b"\x00", b" ", b"Binary files a and b differ"]
TEXTS = st.builds(
    lambda lines, end: b"\n".join(lines) + (b"\n" if end else b""),
    st.lists(st.sampled_from(LINES), max_size=14),
    st.booleans(),
)


def read_diffs(folder: Path, data: bytes) -> tuple[FileDiff, ...]:
    path = folder / "0001-x.patch"
    path.write_bytes(data)
    return read_patch(path).diffs


def only(folder: Path, data: bytes) -> FileDiff:
    (diff,) = read_diffs(folder, data)
    return diff


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(old=st.none() | TEXTS, new=st.none() | TEXTS, signed=st.booleans())
def test_diff_and_inverse_give_the_bytes_of_git(
    diff_trees: DiffTrees, tmp_path: Path, old: bytes | None, new: bytes | None, signed: bool
) -> None:
    if old == new:
        return
    trees = [{} if data is None else {"x": data} for data in (old, new)]
    data = diff_trees(*trees) + (b"-- \n2.39.5\n\n" if signed else b"")
    diff = only(tmp_path, b"Why\n\n" + data)
    assert apply_diff(diff, old) == new
    assert apply_diff(diff.inverse(), new) == old


OLD = b"".join(b"line %d\n" % i for i in range(20))
NEW = OLD.replace(b"line 9\n", b"nine\n")


@pytest.mark.parametrize("i", range(6, 13))
def test_each_context_and_removed_line_must_match(diff_trees: DiffTrees, tmp_path: Path, i: int) -> None:
    diff = only(tmp_path, diff_trees({"x": OLD}, {"x": NEW}))
    assert apply_diff(diff, OLD) == NEW
    for end in (b" \n", b"\r\n"):
        with pytest.raises(PatchError, match=rf"0001-x\.patch: x:{i + 1}: the file has"):
            apply_diff(diff, OLD.replace(b"line %d\n" % i, b"line %d%s" % (i, end)))


@pytest.mark.parametrize("old", [b"one more\n" + OLD, OLD.removeprefix(b"line 0\n"), b"", OLD[:60]])
def test_no_offset_and_no_short_file(diff_trees: DiffTrees, tmp_path: Path, old: bytes) -> None:
    diff = only(tmp_path, diff_trees({"x": OLD}, {"x": NEW}))
    with pytest.raises(PatchError, match=r"the file has|beyond the"):
        apply_diff(diff, old)


def test_a_file_is_neither_created_twice_nor_conjured(diff_trees: DiffTrees, tmp_path: Path) -> None:
    create = only(tmp_path, diff_trees({}, {"x": NEW}))
    change = only(tmp_path, diff_trees({"x": OLD}, {"x": NEW}))
    with pytest.raises(PatchError, match="exists already"):
        apply_diff(create, OLD)
    with pytest.raises(PatchError, match="does not exist"):
        apply_diff(change, None)
    with pytest.raises(PatchError, match="deletes the file, but 1 lines would be left"):
        apply_diff(create.inverse(), NEW + b"edited\n")


def test_text_after_a_line_without_end_is_refused(diff_trees: DiffTrees, tmp_path: Path) -> None:
    diff = only(tmp_path, diff_trees({"x": b"a\nb\n"}, {"x": b"a\nB"}))
    with pytest.raises(PatchError, match="before the last line"):
        apply_diff(diff, b"a\nb\nc\n")


HUNK = b"--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n-a\n+b\n c\n"
GIT = b"diff --git a/x b/x\nindex 1111111..2222222 100644\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"Why\n" + HUNK, "holds no 'diff --git' line"),
        (GIT + HUNK + b"+lost\n", r"9 lines of diff != 8 in its headers and hunks"),
        (GIT + HUNK + b"lost\n", r"9 lines of diff != 8"),
        (GIT + HUNK + b"\n", "blank line after the hunk at 1"),
        (GIT + HUNK.replace(b"+1,2", b"+1,3"), "shorter than expected"),
        (GIT + HUNK.replace(b"-1,2 +1,2", b"-1,1 +1,1"), "lines of diff"),
        (GIT + HUNK.replace(b"+1,2", b"+4,2"), None),
        (GIT.replace(b"b/x", b"b/y") + HUNK.replace(b"b/x", b"b/y"), "renames 'a/x' to 'b/y'"),
        (GIT, "changes nothing"),
        (b"diff --git a/x b/x\nold mode 100644\nnew mode 100755\n" + HUNK, "only plain changes.*'old mode 100644'"),
        (b"diff --git a/x b/x\nnew file mode 120000\nindex 0..1\n", "only plain changes.*120000"),
        (GIT + b"Binary files a/x and b/x differ\n", "Binary|changes nothing"),
        ((GIT + HUNK).replace(b"/x", b"/../x"), "not a plain relative path"),
        ((GIT + HUNK).replace(b"a/x", b"a//x").replace(b"b/x", b"b//x"), "not a plain relative path"),
        ((GIT + HUNK).replace(b"a/x", b"x").replace(b"b/x", b"x"), "must start with a/ and b/"),
        (b"Why \xff\n" + GIT + HUNK, "cannot be read as a patch"),
    ],
)
def test_what_is_no_plain_diff_is_refused(tmp_path: Path, data: bytes, message: str | None) -> None:
    if message is None:  # readable, but its new line numbers are wrong
        with pytest.raises(PatchError, match="hunk says new line 4, but it falls on 1"):
            apply_diff(only(tmp_path, data), b"a\nc\n")
    else:
        with pytest.raises(PatchError, match=rf"(?s)0001-x\.patch: .*({message})"):
            read_diffs(tmp_path, data)


def test_trailers_are_the_last_paragraph_only() -> None:
    message = "Subject: [PATCH] Add x\n\nNote: not a trailer.\n\nOrigin: here\nForwarded: no\n"
    header = f"{message}---\n x | 2 +-\nLast-Update: no\n\n"
    assert trailers(header) == {"Origin": "here", "Forwarded": "no"}
