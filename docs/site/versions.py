"""The README's table of versions, from the pins, their patches and what was found of them.

python docs/site/versions.py writes it again.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.version import Version

from r3_adapter.marks import put
from r3_adapter.patch.rebase.results import fingerprint, read_results
from r3_adapter.patch.series import load_series

REPO = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- versions: written by python docs/site/versions.py -->", "<!-- versions end -->"
_HEAD = "| Engine | Release | Python | torch | Comes with | Last run of its tests |\n" + 6 * "| --- " + "|\n"
_USERS: Mapping[tuple[str, str], str] = {
    ("sglang", "0.5.15.post1"): "slime 0.3.1",
    ("megatron-core", "0.16.0rc0"): "slime 0.3.1 and miles 0.1.0 (a commit: `--source`)",
    ("megatron-core", "0.18.0"): "verl 0.9.1",
    ("megatron-core", "0.20.0.dev20260822"): "Megatron-LM's `main` of that day (a commit: `--source`)",
}
_NEEDS_312 = Version("0.17")
"""The first Megatron-core that asks for Python 3.12."""


def table() -> str:
    """Return the table: a row for each release that has patches."""
    return _HEAD + "".join(
        f"| {' | '.join(row)} |\n" for engine in ("sglang", "megatron-core") for row in _rows(engine)
    )


def with_table(text: str) -> str:
    """Return the README's text with the table between its marks.

    Raises:
        R3Error: It has no marks.
    """
    return put(text, BEGIN, END, f"\n{table()}", "README.md")


def _rows(engine: str) -> Iterator[tuple[str, ...]]:
    found, every_time = read_results(REPO / "patches"), _tested_each_time()
    for series in sorted(load_series(REPO / "patches")[engine], key=lambda each: Version(each.version)):
        version, result = series.version, found.get((engine, series.version))
        if (engine, version) in every_time:
            tested = "each run of `.ci/run`"
        elif result:
            beside = "megatron-core" if engine == "sglang" else "sglang"
            passed = all(step["passed"] for step in result["steps"].values())
            tested = f"{result['day']}, {'passed' if passed else 'failed'}, with {beside} {result['versions'][beside]}"
            if result["series"] != fingerprint(series):
                tested += "; the patches changed since"
        else:
            tested = "the patches' own tests alone"
        python = "3.11, 3.12" if engine == "sglang" or Version(version) < _NEEDS_312 else "3.12"
        torch = _torch(version) if engine == "sglang" else "SGLang's"
        yield engine, version, python, torch, _USERS.get((engine, version), ""), tested


def _torch(sglang: str) -> str:
    pins = (REPO / "launch/pins" / f"sglang-{sglang}.txt").read_text(encoding="utf-8")
    (found,) = re.findall(r"^torch==(\S+)$", pins, re.MULTILINE)
    return str(found)


def _tested_each_time() -> set[tuple[str, str]]:
    """Return what .ci/run tests: the defaults of launch/setup.sh, and the newest SGLang."""
    setup = (REPO / "launch/setup.sh").read_text(encoding="utf-8")
    ((sglang, older),) = re.findall(r"local sglang=(\S+) megatron=(\S+)", setup)
    ((newer),) = re.findall(r"\|\| megatron=(\S+)$", setup, re.MULTILINE)
    newest = max(
        (each.stem.removeprefix("sglang-") for each in (REPO / "launch/pins").glob("sglang-*.txt")), key=Version
    )
    return {("sglang", sglang), ("sglang", newest), ("megatron-core", older), ("megatron-core", newer)}


def main() -> int:
    """Write the table."""
    readme = REPO / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
