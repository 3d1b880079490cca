"""Whether this machine and this installation can do what the project is for: one line a question, with what to do.

Nothing is started and no engine is imported, so that it also answers where they cannot be. It is the first thing that a
report of a fault should quote.
"""

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

from r3_adapter.errors import PatchError
from r3_adapter.machine import gpu_driver, version_of
from r3_adapter.patch.installed import State, Status, advice, explain
from r3_adapter.patch.packages import status
from r3_adapter.watchdog import FOLDERS, MEMORY

GIB = 1 << 30
LEAST_SHARED = 1 * GIB
"""Free shared memory: routes of the requests under way, and Ray's object store of a small run, are in it."""
LEAST_DISK = 5 * GIB
"""Free disk: checkpoints of the tiny model and traces take far less, the folder of a run may take more."""
LEAST_FILES = 4096
"""Open files that a process may have: an engine and Ray take some thousand."""
IMPORT_S = 300.0


class Grade(StrEnum):
    """What an answer means: all is well, worth a look, or something will not work."""

    GOOD = "ok"
    NOTE = "note"
    BAD = "BAD"


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    todo: what to do about it; nothing where all is well.
    """

    name: str
    grade: Grade
    says: str
    todo: str = ""

    def __str__(self) -> str:
        said = f"{self.grade:<4}  {self.name}: {self.says}"
        return f"{said}; {self.todo}" if self.todo else said


def examine() -> list[Finding]:
    """Ask all questions; one that cannot be asked is a finding too."""
    return [finding for ask in QUESTIONS for finding in _answers(ask)]


def summary(findings: Sequence[Finding]) -> str:
    """Say in one line how it stands."""
    grades = [each.grade for each in findings]
    bad, notes = grades.count(Grade.BAD), grades.count(Grade.NOTE)
    said = f"{bad} of {len(grades)} things will not work" if bad else f"{len(grades)} things looked at, none is broken"
    return f"{said}, {notes} notes" if notes else said


def to_json(findings: Sequence[Finding]) -> str:
    """Return the findings as JSON, and whether none is bad as `passed`."""
    passed = all(each.grade is not Grade.BAD for each in findings)
    return json.dumps({"passed": passed, "findings": [asdict(each) for each in findings]}, indent=2)


def _answers(ask: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from ask()
    except Exception as error:
        name = ask.__name__.removeprefix("ask_").replace("_", " ")
        yield Finding(name, Grade.BAD, f"cannot be told: {type(error).__name__}: {error}")


def ask_python() -> Iterator[Finding]:
    """Which interpreter this is, and whether the compiled module can be used in it."""
    says = f"{platform.python_version()} at {sys.executable}, {platform.machine()}, {platform.system()}"
    yield Finding("Python", Grade.GOOD, says)
    yield core("r3_adapter._core")


def core(module: str) -> Finding:
    """Try to import the compiled module, in a process of its own: one of another build may end it."""
    mine = f"r3-adapter {version('r3-adapter')}"
    failed = _fails(f"import {module} as core; from r3_adapter.compiled import check_core; check_core(core)")
    if not failed:
        return Finding("r3_adapter", Grade.GOOD, f"{mine}, and its compiled module")
    todo = "build it here: `pip install --force-reinstall --no-deps` with the source or wheel of it"
    return Finding("r3_adapter", Grade.BAD, f"{mine}, but {module} cannot be used: {failed}", todo)


def ask_torch() -> Iterator[Finding]:
    """Whether torch can be imported, and what it sees of GPUs."""
    script = (
        "import json, torch; gpu = torch.cuda.is_available(); print(json.dumps([torch.__version__, torch.version.cuda, "
        "[torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())] if gpu else []]))"
    )
    done = _python(script)
    if done.returncode != 0:
        yield Finding("torch", Grade.BAD, f"cannot be imported: {_last(done.stderr)}", "`pip install torch`")
        return
    found, cuda, gpus = json.loads(done.stdout.splitlines()[-1])
    yield Finding("torch", Grade.GOOD, f"{found}, {f'CUDA {cuda}' if cuda else 'without CUDA'}")
    yield _gpus(cuda, gpus)


def _gpus(cuda: str | None, gpus: Sequence[str]) -> Finding:
    try:
        driver = gpu_driver()
    except (OSError, subprocess.SubprocessError):
        driver = ""
    if gpus:
        return Finding("GPU", Grade.GOOD, f"{len(gpus)} x {', '.join(dict.fromkeys(gpus))}, driver {driver}")
    if not driver:
        return Finding("GPU", Grade.NOTE, "none: both engines run on the CPU, for tests and small models")
    why = f"this torch is built for CUDA {cuda}" if cuda else "this torch is built without CUDA"
    todo = "install a build of torch for this driver"
    return Finding("GPU", Grade.BAD, f"there is one (driver {driver}), but torch does not see it: {why}", todo)


def ask_engines(site: Path | None = None) -> Iterator[Finding]:
    """How each engine stands to its patches, and whether the versions beside it are the ones that it asks for."""
    try:
        found = status(site=site)
    except PatchError as error:
        yield Finding("engines", Grade.BAD, str(error))
        return
    for each in found:
        yield _engine(each)
        if each.state is not State.NOT_INSTALLED and site is None:
            yield from versions_beside(each.distribution)


def _engine(each: Status) -> Finding:
    if each.state is State.APPLIED:
        return Finding(each.distribution, Grade.GOOD, f"{each.installed}, patched")
    todo = advice(each)
    says = explain(each).removeprefix(each.distribution).lstrip(": ").removesuffix(f"; {todo}")
    if each.state is State.NOT_INSTALLED and not each.leftovers:
        return Finding(each.distribution, Grade.NOTE, says, todo)
    return Finding(each.distribution, Grade.BAD, says, todo)


def versions_beside(distribution: str) -> Iterator[Finding]:
    """Compare the installed versions of what a distribution requires with the required ones; only what differs."""
    wrong = []
    for text in requires(distribution) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        have = version_of(requirement.name)
        if have is not None and not requirement.specifier.contains(have, prereleases=True):
            wrong.append(f"{requirement.name} {have} for {requirement.specifier}")
    if wrong:
        says = f"{len(wrong)} of its requirements are installed in other versions: {', '.join(wrong)}"
        yield Finding(f"beside {distribution}", Grade.NOTE, says)


def ask_packages() -> Iterator[Finding]:
    """Whether what the loop and its report need is there."""
    for name, extra, what in (
        ("ray", "rl", "the loop"),
        ("bokeh", "report", "reports"),
        ("transformers", "cpu", "models"),
    ):
        if (found := version_of(name)) is not None:
            yield Finding(name, Grade.GOOD, found)
            continue
        todo = f"`pip install 'r3-adapter[{extra}]'` brings it"
        yield Finding(name, Grade.NOTE, f"not installed: {what} need it", todo)


def ask_memory() -> Iterator[Finding]:
    """How much memory is free, and shared memory."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(facts[name].split()[0]) << 10 for name in ("MemAvailable", "MemTotal"))
    yield Finding("memory", Grade.GOOD, f"{_gib(free)} of {_gib(total)} free, {os.cpu_count()} CPUs")
    todo = "in a container, start it with a larger --shm-size"
    yield room("shared memory", MEMORY, LEAST_SHARED, todo, scarce=Grade.BAD)
    left = [path.name for path in MEMORY.glob(f"{FOLDERS}*")]
    if left:
        yield Finding(
            "payloads", Grade.NOTE, f"{len(left)} folders of engines in {MEMORY}; the next engine removes dead ones"
        )


def ask_disk() -> Iterator[Finding]:
    """Whether files can be written where temporary ones and the results of a run go, and how many bytes are free."""
    yield room("temporary files", Path(tempfile.gettempdir()), LEAST_DISK, "set TMPDIR to a larger disk")
    yield room("this folder", Path.cwd(), LEAST_DISK, "give --out a folder on a larger disk")


def room(name: str, folder: Path, least: int, todo: str, *, scarce: Grade = Grade.NOTE) -> Finding:
    """Look at the free bytes of a folder's file system, and whether a file can be written there.

    least: free bytes that are enough. scarce: what it means if there are fewer.
    """
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"r3")
            file.flush()
    except OSError as error:
        return Finding(name, Grade.BAD, f"{folder} cannot be written: {error.strerror or error}", todo)
    says = f"{_gib(free)} free in {folder}"
    return Finding(name, Grade.GOOD, says) if free >= least else Finding(name, scarce, f"{says} < {_gib(least)}", todo)


def ask_limits() -> Iterator[Finding]:
    """How many files a process may open, and whether it can listen on loopback."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = limit != resource.RLIM_INFINITY and limit < LEAST_FILES
    todo = f"`ulimit -n {LEAST_FILES}` before the run" if few else ""
    yield Finding("open files", Grade.NOTE if few else Grade.GOOD, f"a process may have {limit}", todo)
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            port = server.getsockname()[1]
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except OSError as error:
        yield Finding("loopback", Grade.BAD, f"no port of 127.0.0.1 can be used: {error.strerror or error}")
    else:
        yield Finding("loopback", Grade.GOOD, "127.0.0.1 can be listened at and reached")


QUESTIONS: tuple[Callable[[], Iterator[Finding]], ...] = (
    ask_python,
    ask_torch,
    ask_engines,
    ask_packages,
    ask_memory,
    ask_disk,
    ask_limits,
)


def _fails(script: str) -> str:
    """Return why a script fails; nothing if it does not."""
    done = _python(script)
    return "" if done.returncode == 0 else _last(done.stderr) or f"the interpreter ended with {done.returncode}"


def _python(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_S, check=False)


def _last(text: str) -> str:
    return next(reversed([line.strip() for line in text.splitlines() if line.strip()]), "")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
