"""Checkpoints of a run: whole or not there, and a damaged one is not gone on from."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from r3_adapter.errors import R3Error
from r3_adapter.runs.checkpoints import MANIFEST, Checkpoints, Seal, seal

ABOUT = {"layout": "tp 2"}


def write(folder: Path) -> dict[str, Seal]:
    found = {}
    for name in ("config.json", "model-00001-of-00001.safetensors", "optimizer.0.pt"):
        (folder / name).write_bytes(name.encode() * 100)
        found[name] = seal(folder / name)
    return found


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    found = Checkpoints(tmp_path)
    for step in (4, 8, 12):
        assert found.save(step, write, ABOUT) == found.path(step)
    return found


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(**change: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / MANIFEST
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "no such file"),
    "half a manifest": (lambda folder: os.truncate(folder / MANIFEST, 40), "no JSON"),
    "deep manifest": (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "no JSON"),
    "another manifest": (lambda folder: (folder / MANIFEST).write_text("[]"), "not an object"),
    "no files": (edit(files={}), "files is no object of sizes and digests"),
    "odd files": (edit(files={"config.json": 5}), "files is no object of sizes and digests"),
    "files elsewhere": (edit(files={"../x": [1, "0"]}), "'../x' is no name of a file"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "no such file"),
    "a file is missing": (lambda folder: (folder / "optimizer.0.pt").unlink(), r"optimizer\.0\.pt: is missing"),
    "a file is short": (lambda folder: os.truncate(folder / "config.json", 7), r"config\.json: 7 bytes != 1100"),
    "a bit is wrong": (lambda folder: flip(folder / "optimizer.0.pt"), r"optimizer\.0\.pt: sha256 \w{16}\.\. != "),
    "a shard too many": (lambda folder: (folder / "model-9.safetensors").touch(), r"model-9.* is not in the manifest"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_an_older_one_is_taken_for_a_damaged_one(name: str, checkpoints: Checkpoints) -> None:
    damage, said = DAMAGE[name]
    damage(checkpoints.path(12))
    found = checkpoints.newest(ABOUT)
    assert found is not None and (found.step, found.folder) == (8, checkpoints.path(8))
    assert found.damaged.keys() == {12}
    with pytest.raises(R3Error, match=said):
        raise R3Error(found.damaged[12])
    checkpoints.set_aside([12])
    assert checkpoints.steps() == [4, 8] and (checkpoints.folder / "00000012.damaged").is_dir()
    assert checkpoints.save(12, write, ABOUT).is_dir()
    whole = checkpoints.newest(ABOUT)
    assert whole is not None and whole.step == 12 and not whole.damaged


def test_no_step_is_read_off_other_names(checkpoints: Checkpoints) -> None:
    for name in ("00000020.bak", "00000020.damaged", "20", "0000000012", "\u0661\u0662", "x", "9" * 5000, "-0000012"):
        if len(name) < 255:
            (checkpoints.folder / name).mkdir()
    (checkpoints.folder / "00000016").write_text("a file")
    assert checkpoints.steps() == [4, 8, 12]
    checkpoints.prune(2)
    assert checkpoints.steps() == [8, 12] and (checkpoints.folder / "00000020.bak").is_dir()


def test_a_run_without_a_whole_one_is_refused_and_one_without_any_is_new(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    assert Checkpoints(tmp_path / "other").newest(ABOUT) is None
    for step in checkpoints.steps():
        flip(checkpoints.path(step) / "config.json")
    with pytest.raises(R3Error, match=r"^no checkpoint is whole: .*00000012/config\.json: sha256 .*00000004/config"):
        checkpoints.newest(ABOUT)


def test_another_layout_is_no_damage(checkpoints: Checkpoints) -> None:
    with pytest.raises(R3Error, match=r"00000012: written with layout tp 2 != tp 1$"):
        checkpoints.newest({"layout": "tp 1"})


def test_one_that_was_not_written_to_its_end_is_not_there(checkpoints: Checkpoints) -> None:
    def broken(folder: Path) -> dict[str, Seal]:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(16, broken, ABOUT)
    found = checkpoints.newest(ABOUT)
    assert found is not None and found.step == 12 and not found.damaged
    assert checkpoints.save(16, write, ABOUT).is_dir() and not list(checkpoints.folder.glob("partial-*"))
