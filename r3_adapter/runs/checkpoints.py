"""The checkpoints of a run: each is there whole or not at all, and is checked before a run goes on from it.

RUN/checkpoints/00000020/                a checkpoint, by the step that it was written before
RUN/checkpoints/00000020/checkpoint.manifest
                                         JSON: size and sha256 of each file; written last
RUN/checkpoints/00000020.damaged/        one that was found damaged, kept for whoever wants to know why
RUN/checkpoints/partial-20/              one that is being written
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3_adapter.errors import R3Error
from r3_adapter.runs.files import read_object, write_json

MANIFEST = "checkpoint.manifest"
Seal = tuple[int, str]
"""Size in bytes, and sha256 in hexadecimal digits."""


def seal(path: Path) -> Seal:
    """Flush a file to disk, and return what its manifest says of it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Found:
    """Where a run goes on: a step, its checkpoint, and what is wrong with newer ones, by their step."""

    step: int
    folder: Path
    damaged: Mapping[int, str]


class Checkpoints:
    """The checkpoints in a run's folder; other things in there are left alone."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps that there is a folder for, in order, whole or not."""
        names = [path.name for path in self.folder.glob("[0-9]*") if path.is_dir()]
        steps = {int(name): name for name in names if name.isascii() and name.isdigit() and len(name) < 20}
        return sorted(step for step in steps if self.path(step).name in names)

    def newest(self, about: Mapping[str, Any]) -> Found | None:
        """Return the newest checkpoint that is whole; None if there are none at all.

        about: what a checkpoint must have been written with to be of use, as `save` was told.

        Raises:
            R3Error: none is whole, or that checkpoint was written with something else.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            folder = self.path(step)
            try:
                was = _check(folder)
            except R3Error as error:
                damaged[step] = str(error)
                continue
            for key, value in about.items():
                if was.get(key) != value:
                    raise R3Error(f"{folder}: written with {key} {was.get(key)} != {value}")
            return Found(step, folder, damaged)
        if damaged:
            raise R3Error(f"no checkpoint is whole: {'; '.join(damaged.values())}")
        return None

    def set_aside(self, steps: Sequence[int]) -> None:
        """Give damaged checkpoints another name, under which they are no checkpoints any more."""
        for step in steps:
            aside = self.folder / f"{self.path(step).name}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            self.path(step).rename(aside)

    def save(self, step: int, write: Callable[[Path], Mapping[str, Seal]], about: Mapping[str, Any]) -> Path:
        """Let `write` fill a folder and say what it wrote; the checkpoint is there once all is on the disk.

        Raises:
            R3Error: the disk is full; what was written of it is removed.
        """
        partial, folder = self.folder / f"partial-{step}", self.path(step)
        for old in self.folder.glob("partial-*"):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            files = {name: list(sealed) for name, sealed in sorted(write(partial).items())}
            write_json(partial / MANIFEST, {**about, "files": files})
        except R3Error:
            # It would keep full a disk that is full.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _flush(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _flush(self.folder)
        return folder

    def prune(self, keep: int) -> None:
        """Delete all but the newest."""
        for step in self.steps()[:-keep]:
            shutil.rmtree(self.path(step), ignore_errors=True)


def _check(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint was written with.

    Raises:
        R3Error: a file is missing, changed or too much.
    """
    place = folder / MANIFEST
    manifest = read_object(place)
    files = manifest.pop("files", None)
    if not (isinstance(files, dict) and files and all(map(_is_seal, files.values()))):
        raise R3Error(f"{place}: files is no object of sizes and digests")
    if odd := [name for name in files if Path(name).name != name]:
        raise R3Error(f"{place}: {odd[0]!r} is no name of a file")
    if more := sorted({path.name for path in folder.glob("*.safetensors")} - files.keys()):
        raise R3Error(f"{folder / more[0]}: is not in the manifest")
    # Sizes first: they cost nothing.
    for name, (size, _) in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise R3Error(f"{path}: {'is missing' if found is None else f'{found} bytes != {size}'}")
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        paths = [folder / name for name in files]
        for path, (_, want), found in zip(paths, files.values(), pool.map(_digest, paths), strict=True):
            if found != want:
                raise R3Error(f"{path}: sha256 {found[:16]}.. != {want[:16]}..")
    return manifest


def _is_seal(value: object) -> bool:
    return isinstance(value, list) and list(map(type, value)) == [int, str]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise R3Error(f"{path}: cannot be read: {error.strerror}") from error


def _flush(folder: Path) -> None:
    """Let the names in a folder be on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
