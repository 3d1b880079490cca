"""Tests of every pin of the engines, in turn; launch/pins.sh starts it. It needs the standard library alone."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
TIMEOUT = 1800
"""Seconds that a step may take; an environment of a pin is one."""

SGLANG_TESTS = "tests/integration/test_sglang_engine.py::test_"
MEGATRON_TESTS = "tests/integration/test_megatron_router.py::test_"
OFF = {
    "sglang": SGLANG_TESTS + "with_the_option_off_the_patched_engine_is_the_released_one",
    "megatron-core": MEGATRON_TESTS + "without_routes_it_computes_the_released_bits",
}
OWN = {
    "sglang": SGLANG_TESTS + "upstream_tests_of_the_series_pass",
    "megatron-core": MEGATRON_TESTS + "upstream_tests_of_the_series_pass",
}

SETUP = """
set -euo pipefail
source launch/setup.sh >&2
r3_setup >&2
echo "$VENV"
"""

# Only Megatron-core changes, so that its pins share an environment; the next r3_setup there installs the default again.
EXCHANGE = """
set -euo pipefail
[ "$("$1/bin/python" -c 'import importlib.metadata as m; print(m.version("megatron-core"))')" != "$2" ] || exit 0
rm -f "$1/.r3-setup"
"$1/bin/r3" patch revert megatron-core
"$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "megatron-core==$2"
"$1/bin/r3" patch apply megatron-core
"""

# Every installed file is the wheel's, and there is no other.
AS_RECORDED = """
import base64, hashlib, sys
from importlib.metadata import distribution
from pathlib import Path

found = distribution(sys.argv[1])
files = [file for file in found.files if ".dist-info" not in file.parts[0] and ".." not in file.parts]
known = {Path(file.locate()): file.hash for file in files}
wrong = []
for path, recorded in known.items():
    if recorded:
        made = hashlib.new(recorded.mode, path.read_bytes()).digest() if path.exists() else b""
        if base64.urlsafe_b64encode(made).decode().rstrip("=") != recorded.value:
            wrong.append(f"{path}: not as RECORD has it")
for folder in {file.parts[0] for file in files}:
    for path in Path(found.locate_file(folder)).rglob("*"):
        if path.is_file() and path not in known and "__pycache__" not in path.parts:
            wrong.append(f"{path}: not in RECORD")
sys.exit("\\n".join(wrong) or 0)
"""


def main(arguments: list[str] | None = None) -> int:
    """Test the pins; return the exit code: 0, 1 if one failed, 2 if one is none."""
    parser = argparse.ArgumentParser(prog="launch/pins.sh", description="test every pin, or those that are named")
    parser.add_argument("pins", nargs="*", metavar="PIN", help="DISTRIBUTION==VERSION; default: all")
    parser.add_argument("--quick", action="store_true", help="without the tests of the engines and further proofs")
    parser.add_argument("--record", action="store_true", help="keep what was found in patches/results.jsonl")
    options = parser.parse_args(arguments)
    if options.record and options.quick:
        parser.error("--record keeps what all tests say, and --quick leaves most of them out")
    known = all_pins()
    for pin in options.pins:
        distribution, _, version = pin.partition("==")
        source = REPO / "patches" / distribution / version / "source"
        if source.is_file():
            said = source.read_text(encoding="utf-8").strip()
            parser.error(f"{pin}: no registry has it, it is {said}; there: `r3 patch apply --source DIR`")
    unknown = [pin for pin in options.pins if pin not in known]
    if unknown:
        parser.error(f"no pins: {', '.join(unknown)}; pins: {', '.join(known)}")
    results: list[dict] = []
    shared: dict[str, str] = {}
    for pin in options.pins or known:
        results.append(test_pin(pin, options.quick, shared))
        print(json.dumps(results[-1]), flush=True)
        if options.record:
            record(results[-1])
    print_table(results)
    return int(not all(result["passed"] for result in results))


def record(result: dict) -> None:
    """Have the pin's environment, which knows its versions, keep the result and write the table of versions."""
    if not result["environment"]:
        say(f"{result['pin']}: no environment, so that nothing is recorded")
        return
    command = [str(Path(result["environment"]) / "bin/python"), "-m", "r3_adapter.patch.rebase.table"]
    found = {name: result[name] for name in ("pin", "steps")}
    subprocess.run(command, cwd=REPO, input=json.dumps(found), text=True, check=True)


def all_pins() -> list[str]:
    """Return the folders that have a series for a version which a registry has, as DISTRIBUTION==VERSION."""
    found = [path.parent for path in sorted((REPO / "patches").glob("*/*/series"))[::-1]]
    return [f"{path.parent.name}=={path.name}" for path in found if not (path / "source").exists()]


def test_pin(pin: str, quick: bool, shared: dict[str, str]) -> dict:
    """Run a pin's steps and return what became of them; without an environment there are no further ones.

    shared: the environments that pins of Megatron-core took turns in so far, by interpreter.
    """
    say(pin)
    result: dict = {"pin": pin, "quick": quick, "environment": None, "steps": {}, "passed": False}
    with tempfile.TemporaryDirectory(prefix="r3-pins-") as folder:
        log = Path(folder, "log")
        if not run_setup(pin, result, log, shared):
            return result
        for name, command in steps(pin, Path(result["environment"]), quick).items():
            result["steps"][name] = run_step(pin, name, command, log)
    result["passed"] = all(step["passed"] for step in result["steps"].values())
    return result


def run_setup(pin: str, result: dict, log: Path, shared: dict[str, str]) -> bool:
    """Make the pin's environment with its engine patched; note it in the result, and return whether it is there."""
    distribution, version = pin.split("==")
    environment = dict(os.environ)
    for name in ("SGLANG_VERSION", "MEGATRON_VERSION", "R3_VENV"):
        environment.pop(name, None)
    if distribution == "sglang":
        environment["SGLANG_VERSION"] = version
    elif tuple(map(int, version.split(".")[:2])) >= (0, 17):
        environment["PYTHON"] = newer_python()
    interpreter = environment.get("PYTHON", "")
    venv = shared.get(interpreter, "") if distribution == "megatron-core" else ""
    if not venv:
        result["steps"]["setup"] = run_step(pin, "setup", ["bash", "-c", SETUP], log, environment)
        if not result["steps"]["setup"]["passed"]:
            return False
        venv = log.read_text(encoding="utf-8").split()[-1]
    result["environment"] = venv
    if distribution == "megatron-core":
        shared[interpreter] = venv
        exchange = ["bash", "-c", EXCHANGE, "exchange", venv, version]
        result["steps"]["exchange"] = run_step(pin, "exchange", exchange, log)
        return result["steps"]["exchange"]["passed"]
    return True


def newer_python() -> str:
    """Return the Python 3.12 or newer that launch/setup.sh finds; where there is none, a name that says so."""
    script = "source launch/setup.sh; r3_newer_python"
    ran = subprocess.run(["bash", "-c", script], cwd=REPO, stdout=subprocess.PIPE, text=True, check=False)
    return ran.stdout.strip() or "python3.12"


def steps(pin: str, venv: Path, quick: bool) -> dict[str, list[str]]:
    """Return what a pin must pass, by the name of its column."""
    distribution = pin.partition("==")[0]
    r3, python = str(venv / "bin/r3"), str(venv / "bin/python")
    test, prove = [python, "-m", "pytest", "-q", "--tb=short"], [r3, "prove"]
    revert = f'"{r3}" patch revert {distribution} && "{python}" -c "$1" {distribution}'
    again = f'"{r3}" patch apply {distribution} && "{r3}" patch verify {distribution}'
    found = {
        "verify": [r3, "patch", "verify", distribution],
        "tests": [*test, OWN[distribution]],
        "off": [*test, OFF[distribution]],
        "prove": prove,
        "ep 2": [*prove, "--ep", "2"],
        "group 8": [*prove, "--group", "8"],
        "retract": [*prove, "--retract"],
        "revert": ["bash", "-c", revert, "revert", AS_RECORDED],
        "again": ["bash", "-c", again],
    }
    return {name: found[name] for name in ("verify", "prove", "revert", "again")} if quick else found


def run_step(pin: str, name: str, command: list[str], log: Path, environment: dict[str, str] | None = None) -> dict:
    """Run a command; say what it said if it failed."""
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        try:
            ran = subprocess.run(
                command, cwd=REPO, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=TIMEOUT, check=False
            )
            passed, why = ran.returncode == 0, f"exit code {ran.returncode}"
        except (subprocess.TimeoutExpired, OSError) as error:
            passed, why = False, str(error)
    said = log.read_text(encoding="utf-8", errors="replace")
    # pytest succeeds where all is skipped.
    if passed and "pytest" in command and " passed" not in said:
        passed, why = False, "no test ran"
    seconds = round(time.monotonic() - start, 1)
    say(f"{pin} {name}: {'passed' if passed else why} after {seconds} s")
    if not passed:
        print("\n".join(said.splitlines()[-40:]), file=sys.stderr)
    return {"passed": passed, "seconds": seconds}


def print_table(results: list[dict]) -> None:
    """Print a row for each pin: the seconds of each step that passed, or FAILED."""
    names = list(dict.fromkeys(name for result in results for name in result["steps"]))
    rows = [["pin", *names]]
    for result in results:
        cells = [result["steps"].get(name) for name in names]
        texts = ["-" if cell is None else f"{cell['seconds']:.0f} s" if cell["passed"] else "FAILED" for cell in cells]
        rows.append([result["pin"], *texts])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip(), file=sys.stderr)


def say(text: str) -> None:
    """Print a line of progress beside the results."""
    print(f"==> {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
