"""A made-up engine of a few files with a pinned series, and releases of it that differ."""

import re
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

from r3_adapter.patch import packages
from r3_adapter.patch.rebase.table import END, START

DiffTrees = Callable[[Mapping[str, bytes], Mapping[str, bytes]], bytes]

HEADER = """From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: Maintainer <maintainer@example.org>
Date: Mon, 5 Jan 2026 09:00:00 +0000
Subject: [PATCH] {subject}

{why}

Origin: vendor
Forwarded: no
Applied-Upstream: no
Last-Update: 2026-01-05
---

"""
RELEASED = {
    "engine/__init__.py": "",
    "engine/envs.py": "class EnvBool:\n    def get(self) -> bool:\n        return True\n\n\nclass Envs:\n"
    "    ENGINE_FAST = EnvBool()\n    ENGINE_SAFE = EnvBool()\n\n\nenvs = Envs()\n",
    "engine/req.py": "class Req:\n    def __init__(self, ids: list[int]) -> None:\n        self.input_ids = ids\n"
    "        self.salt = ''\n\n\nclass Batch:\n    loc: int = 0\n\n\ndef rows_of(req: Req, limit: int) -> list[int]:\n"
    "    return req.input_ids[:limit]\n",
    "engine/base.py": "class BaseCapturer:\n    def on_end(self, loc: int) -> int:\n        return loc\n",
    "engine/sizes.py": "class Sizes:\n    dp_size: int = 1\n\n\ndef get_sizes() -> Sizes:\n    return Sizes()\n",
    "engine/scheduler.py": "from engine.req import Req\n\n\ndef release(req):\n    slots = req.input_ids\n"
    "    done = len(slots)\n    more = done + 1\n"
    "    last = more + 1\n    return last\n\n\nclass Scheduler:\n"
    "    def step(self, req: Req):\n        done = self.forward(req)\n"
    "        release(req)\n        return done\n\n    def forward(self, req: Req):\n        return 1\n",
}
CAPTURE = """from engine.base import BaseCapturer
from engine.envs import envs
from engine.req import Batch, Req, rows_of
from engine.sizes import get_sizes


class Capturer(BaseCapturer):
    def on_end(self, loc: int) -> int:
        return loc * get_sizes().dp_size

    def collect(self, req: Req, batch: Batch, other) -> list[int]:
        if envs.ENGINE_FAST.get():
            return rows_of(req, limit=batch.loc)
        return [len(req.input_ids), other.salt, getattr(other, "maybe", 0)]
"""
CAPTURE_TEST = "from engine.capture import Capturer\n\n\ndef test_on_end():\n    assert Capturer().on_end(3) == 3\n"
HOOKS = (
    ("    slots = req.input_ids\n", "    slots = req.input_ids\n    capturer.keep(slots)\n"),
    (
        "from engine.req import Req\n",
        "from engine.capture import Capturer\nfrom engine.req import Req\n\ncapturer = Capturer()\n",
    ),
)


def edited(files: Mapping[str, str], *edits: tuple[str, str, str]) -> dict[str, str]:
    """Return files with some text replaced, wherever it is in a file."""
    result = dict(files)
    for path, old, new in edits:
        assert re.search(old, result[path]), (path, old)
        result[path] = re.sub(old, new, result[path])
    return result


def make_wheel(folder: Path, version: str, files: Mapping[str, str], name: str = "engine") -> Path:
    """Write a wheel as build tools do."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    data = {path: text.encode() for path, text in files.items()}
    data[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    rows = [
        f"{path},sha256={urlsafe_b64encode(sha256(each).digest()).rstrip(b'=').decode()},{len(each)}\n"
        for path, each in data.items()
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, each in data.items():
            archive.writestr(path, each)
        archive.writestr(f"{info}/RECORD", "".join(rows))
    return wheel


def make_pins(folder: Path, diff_trees: DiffTrees) -> Path:
    """Write a series for version 1.0 of the engine, and lock it; return the folder of all series."""
    root = folder / "patches"
    site = folder / "site"
    with zipfile.ZipFile(make_wheel(folder, "1.0", RELEASED)) as wheel:
        wheel.extractall(site)
    upstream = {f"python/{path}": text.encode() for path, text in RELEASED.items()}
    added = {"python/engine/capture.py": CAPTURE.encode(), "test/test_capture.py": CAPTURE_TEST.encode()}
    scheduler = RELEASED["engine/scheduler.py"]
    for old, new in HOOKS:
        scheduler = scheduler.replace(old, new)
    hooked = {**upstream, **added, "python/engine/scheduler.py": scheduler.encode()}
    texts = {
        "shared/0001-capture-Add-a-capturer.patch": ("capture: Add a capturer", upstream, {**upstream, **added}),
        "1.0/0002-capture-Keep-slots.patch": ("capture: Keep slots", {**upstream, **added}, hooked),
    }
    for name, (subject, old, new) in texts.items():
        path = root / "engine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        header = HEADER.format(subject=subject, why=f"{subject} because rows are lost.")
        path.write_bytes(header.encode() + diff_trees(old, new))
    listing = "../shared/0001-capture-Add-a-capturer.patch\n0002-capture-Keep-slots.patch\n"
    (root / "engine/1.0/series").write_text(listing)
    (root / "upstream.lock.toml").write_text('[engine]\nprefix = "python/"\npackage = "engine"\n')
    (root / "README.md").write_text(
        "# Patches\n\n| Patch | Pins |\n| --- | --- |\n| engine `0001-capture-Add-a-capturer.patch` | 1.0 | why |\n"
        f"| engine `0002-capture-Keep-slots.patch` | 1.0 | why |\n\n{START}\n{END}\n"
    )
    packages.lock("engine", "1.0", site=site, root=root)
    return root
