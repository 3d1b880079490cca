"""Wheels from the registry: which one, and its files. What a wheel says is not trusted until it is checked."""

import csv
import io
import re
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path, PurePosixPath

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from r3_adapter.errors import PatchError

NEWEST = "newest"
"""In place of a version: the newest one that the registry has."""

_PYTHONS = ("3.12", "3.11", "3.13", "3.14", "3.10")
_TRIES = 2
"""Pythons for which the registry has no version at all; it is not asked for more then, or is not there."""
_RECORD = re.compile(r"[^/]+\.dist-info/RECORD")
_SOURCE = (".py", ".pyi")
_MOST = 2**30
"""Bytes of what is read of a wheel, unpacked."""


def download(name: str, version: str, folder: Path) -> Path:
    """Have pip download the wheel of a release for some Python, and check it by the registry's hash; return its path.

    version: or NEWEST.

    Raises:
        PatchError: The version is no version, or pip does not give a wheel.
    """
    wanted = name if version == NEWEST else f"{name}=={checked_version(version)}"
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    said, nothing = "", 0
    for python in dict.fromkeys(_PYTHONS if version == NEWEST else (mine, *_PYTHONS)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        options = ["--only-binary=:all:", f"--python-version={python}", f"--dest={folder}"]
        ran = subprocess.run([*pip, *options, wanted], capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if ran.returncode == 0 and len(wheels) == 1:
            return wheels[0]
        lines = ran.stderr.splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
        said = (errors or lines or [f"exit code {ran.returncode}"])[-1]
        nothing += "(from versions: none)" in ran.stderr
        if nothing == _TRIES:
            break
    raise PatchError(f"{wanted}: pip gives no wheel: {said}")


def checked_version(text: str) -> str:
    """Return a version as it is written, if it is one.

    Raises:
        PatchError: It is none; a file name or an option of pip could be.
    """
    try:
        return str(Version(text))
    except InvalidVersion as error:
        raise PatchError(f"{text!r}: not a version") from error


def version_of(wheel: Path, name: str) -> str:
    """Return the version that the name of a wheel's file gives.

    Raises:
        PatchError: It is not a wheel of the distribution.
    """
    try:
        found, version, _, _ = parse_wheel_filename(wheel.name)
    except InvalidWheelFilename as error:
        raise PatchError(f"{wheel}: not the name of a wheel: {error}") from error
    if found != canonicalize_name(name):
        raise PatchError(f"{wheel}: a wheel of {found} != {name}")
    return str(version)


def wheel_files(wheel: Path, package: str, *, source: bool = True) -> dict[str, bytes]:
    """Return the files of a package in a wheel, by path in site-packages.

    package: the folder that they are in or below.
    source: only those of Python source.

    Raises:
        PatchError: It is not a wheel; a path leads elsewhere or comes twice; a file is not as its RECORD says.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [info for info in archive.infolist() if not info.is_dir()]
            (record,) = [info for info in entries if _RECORD.fullmatch(info.filename)]
            hashes = {row[0]: row[1] for row in csv.reader(io.StringIO(archive.read(record).decode())) if len(row) > 1}
            _check_paths(wheel, [info.filename for info in entries])
            inside = [info for info in entries if info.filename.startswith(f"{package}/")]
            wanted = [info for info in inside if not source or info.filename.endswith(_SOURCE)]
            if (size := sum(info.file_size for info in wanted)) > _MOST:
                raise PatchError(f"{wheel}: {size} bytes in {package} > {_MOST}")
            files = {info.filename: archive.read(info) for info in wanted}
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, csv.Error) as error:
        if isinstance(error, PatchError):
            raise
        raise PatchError(f"{wheel}: cannot be read as a wheel: {error}") from error
    for path, data in files.items():
        have = "sha256=" + urlsafe_b64encode(sha256(data).digest()).rstrip(b"=").decode()
        if hashes.get(path) != have:
            raise PatchError(f"{wheel}: {path}: {have} != {hashes.get(path)} in RECORD")
    if not files:
        raise PatchError(f"{wheel}: no {'source ' if source else ''}files in {package}")
    return files


def _check_paths(wheel: Path, paths: list[str]) -> None:
    seen: set[str] = set()
    for path in paths:
        pure = PurePosixPath(path)
        if pure.is_absolute() or str(pure) != path or ".." in pure.parts or "\\" in path or ".git" in pure.parts:
            raise PatchError(f"{wheel}: {path!r} is not a plain path below site-packages")
        if path in seen:
            raise PatchError(f"{wheel}: has {path!r} twice")
        seen.add(path)
