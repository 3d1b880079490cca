"""Questions to a machine with GPUs, and the record of what it answered; launch/gpu.sh starts it.

It needs the standard library alone; what the items need is looked for, and one that lacks something is recorded so.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import shorten
from typing import Any

from gpu_items import GPU_TESTS, ITEMS, Item, command_of
from gpu_page import RECORDS, slug, write_page

REPO = Path(__file__).resolve().parents[1]
MINUTES = 10
"""What all items that one GPU can answer may take."""
GRACE = 5.0
"""Seconds between asking a process to end and ending it."""
VERSIONS = (
    *("r3-adapter", "sglang", "sglang-kernel", "megatron-core", "transformer-engine", "torch", "triton"),
    *("flashinfer-python", "deep-ep", "transformers", "numpy", "ray"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, record, and return the exit code: 0, 1 if an item failed, 2 if nothing can be asked."""
    options = parse(arguments)
    if options.page:
        write_page()
        return 0
    gpus = gpu_names()
    if options.list:
        for item in ITEMS:
            print(f"{item.name}: {item.asks} {f'({why})' if (why := lacks(item, len(gpus))) else ''}".rstrip())
        return 0
    if not gpus and not options.rehearse:
        say("there is no GPU here; --rehearse walks all steps without one")
        return 2
    folder = options.out or Path(tempfile.mkdtemp(prefix="r3-gpu-"))
    folder.mkdir(parents=True, exist_ok=True)
    items = [item for item in ITEMS if not options.only or item.name in options.only]
    record, found, path = about(gpus), list[dict[str, Any]](), None
    for part in ask_all(items, folder, len(gpus), options):
        found += part
        if not options.rehearse:
            # After each stage: a machine may be taken away.
            path = keep(options.record or RECORDS / f"{record['date']}-{slug(gpus)}.json", {**record, "items": found})
    if path is not None:
        if path.parent.resolve() == RECORDS.resolve():
            write_page()
        say(f"recorded in {path}; logs in {folder}")
    print_table(found)
    return int(any(each["result"] in ("failed", "late") for each in found))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(prog="launch/gpu.sh", description="ask a machine with GPUs, and record it")
    parser.add_argument("--only", nargs="+", default=[], metavar="ITEM", help="these, in the order of --list")
    parser.add_argument("--seconds", type=float, metavar="N", help="for all; default: 600 on one GPU, else no limit")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: all items, smaller; no record")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of logs and figures; default: a temporary one")
    parser.add_argument("--record", type=Path, metavar="FILE", help="default: docs/gpu/DATE-GPU.json")
    parser.add_argument("--no-setup", action="store_true", help="take what PYTHON has installed")
    parser.add_argument("--list", action="store_true", help="print the items, and what this machine lacks for each")
    parser.add_argument("--page", action="store_true", help="write docs/gpu.md again, from the records")
    options = parser.parse_args(arguments)
    known = [item.name for item in ITEMS]
    if unknown := [name for name in options.only if name not in known]:
        parser.error(f"no items: {', '.join(unknown)}; items: {', '.join(known)}")
    return options


def ask_all(items: Sequence[Item], folder: Path, num_gpus: int, options: argparse.Namespace) -> Iterator[list[Any]]:
    """Ask stage by stage and yield what became of its items; what does not fit the time is not run, and says so."""
    seconds = options.seconds or (float("inf") if options.rehearse or num_gpus > 1 else 60.0 * MINUTES)
    until = time.monotonic() + seconds
    for stage in dict.fromkeys(item.stage for item in items):
        found, ready = dict[str, dict[str, Any]](), []
        for item in (each for each in items if each.stage == stage):
            left = until - time.monotonic()
            why = lacks(item, num_gpus, rehearse=options.rehearse)
            if not why and item.limit > left:
                why = f"it may take {item.limit} s, and {max(0, left):.0f} s were left"
            if why:
                found[item.name] = {"name": item.name, "result": "not run", "says": why}
                say(f"{item.name}: not run: {why}")
            else:
                ready.append(item)
        # Without a GPU there are few cores: one after the other.
        for group in [[item] for item in ready] if options.rehearse else [ready]:
            found.update(run_stage(group, folder, rehearse=options.rehearse))
        yield [found[item.name] for item in items if item.stage == stage]


def lacks(item: Item, num_gpus: int, *, rehearse: bool = False) -> str:
    """Say what an item needs that is not here; nothing where all is. A rehearsal needs no GPU."""
    if num_gpus < item.gpus and not rehearse:
        return f"needs {item.gpus} GPUs, and there {'is 1' if num_gpus == 1 else f'are {num_gpus}'}"
    needs = [*item.needs, *(["pytest"] if item.command[0] == "pytest" else [])]
    missing = [name for name in needs if version_of(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    unset = [name for name in item.variables if not os.environ.get(name) and not rehearse]
    return f"{' and '.join(unset)} not set" if unset else ""


def run_stage(items: Sequence[Item], folder: Path, *, rehearse: bool) -> dict[str, dict[str, Any]]:
    """Run items side by side, each until its limit; return what became of them."""
    machine = json.loads(os.environ.get("SGLANG_ARGS") or "{}")
    # PYTHON, R3: for launch/start.sh. PYTHONSAFEPATH: as -P, in the processes that a command starts.
    programs = {"PYTHON": sys.executable, "R3": str(Path(sys.executable).with_name("r3"))}
    environment = os.environ | programs | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    if rehearse:
        # DRY_RUN: launch/start.sh plans the run of a real model, and prints its command.
        environment |= {GPU_TESTS: "rehearse", "DRY_RUN": "1"}
    running, found = {}, {}
    for item in items:
        command = command_of(item, folder, machine, rehearse=rehearse)
        say(f"{item.name}: {' '.join(command)}")
        with (folder / f"{item.name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=REPO,
                env=environment,
                start_new_session=True,
            )
        running[item.name] = (item, command, process, time.monotonic())
    try:
        while running:
            for item, command, process, start in list(running.values()):
                seconds = time.monotonic() - start
                late = seconds > item.limit * (6 if rehearse else 1)
                if process.poll() is None and not late:
                    continue
                end(process)
                del running[item.name]
                code = None if late else process.returncode
                found[item.name] = outcome(item, command, folder, code, seconds)
                say(f"{item.name}: {found[item.name]['result']} after {seconds:.0f} s: {found[item.name]['says']}")
            time.sleep(0.2)
    finally:
        for _, _, process, _ in running.values():
            end(process)
    return found


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and those that it started: by a word first, so that it can clear up what is in other groups."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def outcome(item: Item, command: Sequence[str], folder: Path, code: int | None, seconds: float) -> dict[str, Any]:
    """Return an item's part of the record."""
    said = (folder / f"{item.name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    figures = read_figures(folder / f"{item.name}.json")
    result = "late" if code is None else "failed" if code else "passed"
    last = next((line.strip() for line in reversed(said) if line.strip(" {}[]")), "it said nothing")
    says = str(figures.get("sentence") or "; ".join(shown(item, figures)) or tests_of(said) or last)
    if item.command[0] == "pytest" and result == "passed" and " passed" not in says:
        result, says = "failed", f"no test ran: {says}"
    if result != "passed":
        says = figures.get("sentence") or tests_of(said) or last
        print("\n".join(f"    | {line[:300]}" for line in said[-25:]), file=sys.stderr, flush=True)
    plain = [word.replace(str(folder), "OUT").replace(sys.executable, "python") for word in command]
    return {
        "name": item.name,
        "result": result,
        "seconds": round(seconds, 1),
        "limit": item.limit,
        "command": plain,
        "says": shorten(says.replace(str(folder), "OUT"), 600, placeholder=" ..."),
        "figures": figures,
    }


def read_figures(path: Path) -> dict[str, Any]:
    """Return the JSON object that a command has written; an empty one where it wrote none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {"figures": found}


def shown(item: Item, figures: Mapping[str, Any]) -> list[str]:
    """Return the figures that are said in words."""
    found = []
    for word, path in item.shows.items():
        value: Any = figures
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found.append(f"{word} {value:.4g}" if isinstance(value, float) else f"{word} {value}")
    return found


def tests_of(said: Sequence[str]) -> str:
    """Return pytest's last line, without its time; nothing where it is none."""
    found = re.search(r"(\d+ (?:passed|failed|skipped|deselected|error).*?) in [\d.]+s", said[-1] if said else "")
    return found.group(1) if found else ""


def gpu_names() -> list[str]:
    """Return the names of the GPUs of this machine."""
    return query("name")


def query(field: str) -> list[str]:
    """Ask nvidia-smi; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in said.splitlines() if line.strip()]


def about(gpus: Sequence[str]) -> dict[str, Any]:
    """Return what the answers depend on beside the commands."""
    versions = {"python": sys.version.split()[0], **{name: version_of(name) for name in VERSIONS}}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpus": list(gpus),
        "driver": (query("driver_version") or [""])[0],
        "memory": (query("memory.total") or [""])[0],
        "cpus": os.cpu_count(),
        "versions": {name: found for name, found in versions.items() if found},
        "sglang_args": json.loads(os.environ.get("SGLANG_ARGS") or "{}"),
    }


def version_of(distribution: str) -> str | None:
    """Return an installed version; None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def keep(path: Path, record: Mapping[str, Any]) -> Path:
    """Write a record and return its file: beside one of that day with other versions, and into one with the same.

    Items of that one that were not asked again stay.
    """
    earlier, number, first = read_figures(path), 2, path
    while any(earlier.get("versions", {}).get(name, found) != found for name, found in record["versions"].items()):
        path = first.with_stem(f"{first.stem}-{number}")
        earlier, number = read_figures(path), number + 1
    answered = {each["name"] for each in record["items"] if each["result"] != "not run"}
    stay = {each["name"]: each for each in earlier.get("items", ()) if each["name"] not in answered}
    items = [*stay.values(), *(each for each in record["items"] if each["name"] not in stay)]
    versions = {**earlier.get("versions", {}), **record["versions"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, "versions": versions, "items": items}, indent=1) + "\n", encoding="utf-8")
    return path


def print_table(found: Sequence[Mapping[str, Any]]) -> None:
    """Print a line an item."""
    width = max(len(each["name"]) for each in found)
    for each in found:
        seconds = f"{each['seconds']:.0f} s" if "seconds" in each else ""
        print(f"{each['name']:{width}}  {each['result']:8}{seconds:>7}  {each['says']}")


def say(text: str) -> None:
    """Print a line of progress beside the table."""
    print(f"==> {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
