"""What `r3 patch` notes beside a distribution that it patches: what it made of each file, and the released bytes.

The record is there while a distribution is patched. The journal is there while files are being changed, and left behind
by a change that was stopped: each file that it names is then as before, as after, or as released.
"""

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from r3_adapter.errors import PatchError


@dataclass(frozen=True)
class Note:
    """What is known of a file.

    released: its bytes before any patch; None for a file that patches add.
    ours: sha256 of what patches may have made of it; `series.ABSENT` for a file that they remove.
    """

    released: bytes | None
    ours: frozenset[str]


@dataclass(frozen=True)
class Record:
    """The notes of the files of a version, by path in site-packages."""

    version: str
    files: Mapping[str, Note]

    def to_bytes(self) -> bytes:
        """Return the bytes that `read_record` reads."""
        files = {
            path: {"released": _packed(note.released), "ours": sorted(note.ours)} for path, note in self.files.items()
        }
        return json.dumps({"version": self.version, "files": files}, indent=1).encode() + b"\n"


def record_path(site: Path, distribution: str) -> Path:
    """Return where the record of a distribution is: not in its metadata folder, which pip removes."""
    return site / f"r3-patch-{distribution}.json"


def journal_path(site: Path, distribution: str) -> Path:
    """Return where the journal of a distribution is while its files are changed."""
    return site / f"r3-patch-{distribution}.journal"


def read_record(path: Path, package: str) -> Record | None:
    """Read a record or a journal; None where there is none.

    package: the folder of site-packages that its paths must be in.

    Raises:
        PatchError: It cannot be read, or names a file elsewhere.
    """
    try:
        table = json.loads(path.read_bytes())
        files = {
            name: Note(_unpacked(note["released"]), frozenset(map(str, note["ours"])))
            for name, note in table["files"].items()
        }
        record = Record(str(table["version"]), files)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PatchError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise PatchError(f"{path}: not what `r3 patch` wrote ({type(error).__name__}); move it away") from error
    for name in files:
        if not name.startswith(f"{package}/") or ".." in name.split("/"):
            raise PatchError(f"{path}: names {name!r}, which is not in package {package!r}; move it away")
    return record


def _packed(data: bytes | None) -> str | None:
    return None if data is None else b64encode(zlib.compress(data)).decode()


def _unpacked(text: str | None) -> bytes | None:
    return None if text is None else zlib.decompress(b64decode(text, validate=True))
