"""The tables of docs/gpu.md, from the records in docs/gpu/.

A record is a JSON object: date, gpus (a name each), driver, versions, perhaps a title and a text, and items. An item
has the name of the question in gpu_items.py, a result of RESULTS, what is said of it in a sentence, and perhaps
seconds, command, figures, a title, and sections: paragraphs and tables ({"columns", "rows"}) in order.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_items import ITEMS

REPO = Path(__file__).resolve().parents[1]
RECORDS = REPO / "docs/gpu"
PAGE = REPO / "docs/gpu.md"
BEGIN = "<!-- From here on: ./launch/gpu.sh --page, from docs/gpu/*.json. -->"
END = "<!-- Up to here. -->"
SOFTWARE = ("sglang", "sglang-kernel", "megatron-core", "transformer-engine", "torch", "triton", "python")
"""Versions that are told of each record; the others are in it."""
RESULTS = ("passed", "failed", "late", "not run")


def slug(gpus: Sequence[str]) -> str:
    """Return a name for files: "2x-h100" of two NVIDIA H100."""
    words = re.findall(r"[a-z]+\d+[a-z]*|\d{4}\w*", gpus[0].lower()) if gpus else []
    name = words[0] if words else re.sub(r"\W+", "-", gpus[0].lower()).strip("-") if gpus else "no-gpu"
    return name if len(gpus) < 2 else f"{len(gpus)}x-{name}"


def read_records(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """Return the records, the newest day first.

    Raises:
        ValueError: a file is no record; the message names it and what is wrong.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for name in ("date", "gpus", "driver", "versions", "items"):
            if name not in record:
                raise ValueError(f"{path}: no {name}")
        for item in record["items"]:
            if item.get("result") not in RESULTS:
                raise ValueError(
                    f"{path}: item {item.get('name')!r}: result {item.get('result')!r} is none of {RESULTS}"
                )
        found.append({**record, "file": path.name})
    return sorted(found, key=lambda record: record["date"], reverse=True)


def write_page(page: Path = PAGE, folder: Path = RECORDS) -> None:
    """Put the tables of the records into the page, between its two marks.

    Raises:
        ValueError: the page does not have them once each.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page}: wants {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    made = "\n\n".join(render(read_records(folder)))
    page.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")


def render(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the blocks of the page: the runs, the questions, and each record."""
    blocks = ["## Runs", table(["Record", "GPU", "Software", "Items"], [_run(record) for record in records])]
    blocks += [
        "## Questions",
        table(["Item", "Asks", "GPUs", "Last answer"], [_question(each, records) for each in ITEMS]),
    ]
    for record in records:
        blocks += _record(record)
    return blocks


def _run(record: Mapping[str, Any]) -> list[str]:
    counts = [(result, sum(item["result"] == result for item in record["items"])) for result in RESULTS]
    link = f"[{record['date']}](#{_anchor(_heading(record))})"
    return [link, _gpus(record), _software(record), ", ".join(f"{count} {name}" for name, count in counts if count)]


def _question(item: Any, records: Sequence[Mapping[str, Any]]) -> list[str]:
    for record in records:
        for each in record["items"]:
            if each["name"] == item.name and each["result"] != "not run":
                return [f"`{item.name}`", item.asks, str(item.gpus), f"{record['date']}: {each['result']}"]
    return [f"`{item.name}`", item.asks, str(item.gpus), "has not run"]


def _record(record: Mapping[str, Any]) -> list[str]:
    """Return a record's blocks: a table of its items, then what is longer than a line."""
    blocks = [
        f"## {_heading(record)}",
        f"{_gpus(record)}; {_software(record)}. Record: [{record['file']}](gpu/{record['file']}).",
    ]
    blocks += record.get("text", [])
    rows = [[f"`{item['name']}`", item["result"], _seconds(item), item["says"]] for item in record["items"]]
    blocks.append(table(["Item", "Result", "Seconds", "What was found"], rows))
    for item in record["items"]:
        if item.get("sections"):
            blocks.append(f"### {item.get('title', item['name'])}")
            blocks += [
                each if isinstance(each, str) else table(each["columns"], each["rows"]) for each in item["sections"]
            ]
    return blocks


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return str(text).replace("\n", " ").replace("|", "\\|")


def _heading(record: Mapping[str, Any]) -> str:
    return f"{record['date']}: {record.get('title') or _gpus(record)}"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _gpus(record: Mapping[str, Any]) -> str:
    names = record["gpus"]
    return f"{f'{len(names)} x ' if len(names) > 1 else ''}{names[0]}, driver {record['driver']}"


def _software(record: Mapping[str, Any]) -> str:
    found = record["versions"]
    return ", ".join(f"{name} {found[name]}" for name in SOFTWARE if name in found)


def _seconds(item: Mapping[str, Any]) -> str:
    return f"{item['seconds']:.0f}" if item.get("seconds") is not None else ""
