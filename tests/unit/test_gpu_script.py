"""launch/gpu.sh without a GPU: all that it would run can be started, and its page is what its records say."""

import argparse
import ast
import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from r3_adapter.arguments import add_layout_arguments, add_r3_arguments, add_rl_arguments, add_run_arguments
from r3_adapter.cli import make_parser

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
REPO = LAUNCH.parent


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The script's modules, which import each other as a script's do."""
    names = ("gpu_items", "gpu_page", "gpu")
    sys.path.insert(0, str(LAUNCH))
    yield {name: __import__(name) for name in names}
    sys.path.remove(str(LAUNCH))
    for name in names:
        del sys.modules[name]


def names_of_tests(path: Path, *, gpu: bool = True) -> set[str]:
    """Return the names of the tests of a file; gpu: of those that are marked so, by themselves or all of them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    whole = [node for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)]
    if not gpu or any("mark.gpu" in ast.unparse(node) for node in whole):
        return {test.name for test in tests}
    return {test.name for test in tests if any("mark.gpu" in ast.unparse(mark) for mark in test.decorator_list)}


def parse_loop(arguments: list[str]) -> None:
    """Parse the flags of launch/grpo.py."""
    parser = argparse.ArgumentParser()
    add_run_arguments(add_rl_arguments(add_layout_arguments(add_r3_arguments(parser)))).parse_args(arguments)


def check(words: list[str]) -> None:
    """Refuse a command that would end as soon as it is started, for what its words are."""
    if words[0] == "bash":
        assert os.access(REPO / words[1], os.X_OK), words
        parse_loop(["--save", "runs", *words[2:]])
        return
    rest = words[2:] if words[1] == "-P" else words[1:]
    if rest[0] != "-m":
        assert rest[0] == "launch/grpo.py" and (REPO / rest[0]).is_file()
        parse_loop(rest[1:])
        return
    module, arguments = rest[1], rest[2:]
    assert find_spec(module), words
    if module == "pytest":
        path = next(Path(word) for word in arguments if word.endswith(".py"))
        found = names_of_tests(REPO / path, gpu="gpu" in arguments)
        chosen = arguments[arguments.index("-k") + 1] if "-k" in arguments else "test"
        assert any(chosen in name for name in found), words
    else:
        make_parser().parse_args(arguments)


@pytest.mark.parametrize("rehearse", [False, True])
def test_all_commands_can_be_started(modules: dict[str, ModuleType], tmp_path: Path, rehearse: bool) -> None:
    items = modules["gpu_items"]
    assert len({item.name for item in items.ITEMS}) == len(items.ITEMS)
    for item in items.ITEMS:
        check(items.command_of(item, tmp_path, {"attention_backend": "triton"}, rehearse=rehearse))


def test_a_word_that_a_command_does_not_know_is_found(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    item = modules["gpu_items"].prove("wrong", "?", "--nonsense", "2")
    with pytest.raises(SystemExit):
        check(modules["gpu_items"].command_of(item, tmp_path, rehearse=False))


def test_one_gpu_is_done_in_ten_minutes(modules: dict[str, ModuleType]) -> None:
    limits: dict[str, int] = {}
    for item in modules["gpu_items"].ITEMS:
        if item.gpus == 1 and not item.variables:
            limits[item.stage] = max(limits.get(item.stage, 0), item.limit)
    assert 300 < sum(limits.values()) <= 600


def test_every_gpu_test_is_an_item(modules: dict[str, ModuleType]) -> None:
    asked = {word for item in modules["gpu_items"].ITEMS for word in item.command if word.endswith(".py")}
    files = {str(path.relative_to(REPO)) for path in (REPO / "tests").rglob("test_*.py") if names_of_tests(path)}
    assert files
    assert files <= asked, "launch/gpu_items.py has no item of a file with tests that are marked gpu"


def test_the_page_is_what_the_records_say(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text((REPO / "docs/gpu.md").read_text())
    modules["gpu_page"].write_page(page)
    assert page.read_text() == (REPO / "docs/gpu.md").read_text()
    records = modules["gpu_page"].read_records()
    assert records
    for record in records:
        for item in record["items"]:
            assert f"`{item['name']}` | {item['result']}" in page.read_text()


def options(modules: dict[str, ModuleType], *words: str) -> argparse.Namespace:
    return modules["gpu"].parse([*words])


def made(modules: dict[str, ModuleType], name: str, code: str, **more: Any) -> Any:
    item = modules["gpu_items"].Item(name, "?", name, ("python", "-c", code), **{"limit": 30, "needs": (), **more})
    return item


def test_what_becomes_of_items(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    """One that passes, fails, comes late, does not fit, and lacks what this machine does not have."""
    write = f"open(r'{tmp_path}/good.json', 'w').write('{{\"sentence\": \"all is well\"}}')"
    sleep = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    )
    items = [
        made(modules, "good", write),
        made(modules, "bad", "import sys; sys.exit('it broke')"),
        made(modules, "slow", sleep, limit=1),
        made(modules, "large", "pass", limit=999),
        made(modules, "wide", "pass", gpus=3),
        made(modules, "poor", "pass", needs=("no-such-distribution",)),
        made(modules, "unset", "pass", variables=("R3_NO_SUCH_VARIABLE",)),
    ]
    parts = modules["gpu"].ask_all(items, tmp_path, 1, options(modules, "--seconds", "100"))
    found = {each["name"]: each for part in parts for each in part}
    assert {name: each["result"] for name, each in found.items()} == {
        "good": "passed",
        "bad": "failed",
        "slow": "late",
        **dict.fromkeys(("large", "wide", "poor", "unset"), "not run"),
    }
    assert [found[name]["says"] for name in ("good", "bad", "wide", "poor", "unset")] == [
        "all is well",
        "it broke",
        "needs 3 GPUs, and there is 1",
        "no-such-distribution not installed",
        "R3_NO_SUCH_VARIABLE not set",
    ]
    assert found["large"]["says"].startswith("it may take 999 s, and ")
    assert "python -c" in " ".join(found["good"]["command"])


def test_records_of_a_day(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    """Answers are joined where the versions are the same; others get a record of their own, and none is lost."""

    def record(torch: str, **results: str) -> dict[str, Any]:
        items = [{"name": name, "result": result, "says": "so"} for name, result in results.items()]
        return {"date": "2026-01-02", "gpus": ["A"], "driver": "1", "versions": {"torch": torch}, "items": items}

    path, keep = tmp_path / "2026-01-02-a.json", modules["gpu"].keep
    assert keep(path, record("2", router="passed", loop="not run")) == path
    assert keep(path, record("2", router="not run", loop="failed")) == path
    found = {item["name"]: item["result"] for item in json.loads(path.read_text())["items"]}
    assert found == {"router": "passed", "loop": "failed"}
    other = keep(path, record("3", router="failed"))
    assert other.name == "2026-01-02-a-2.json" and keep(path, record("3", loop="passed")) == other
    assert {item["name"]: item["result"] for item in json.loads(path.read_text())["items"]} == found
    assert len(modules["gpu_page"].read_records(tmp_path)) == 2


def test_a_record_with_an_unknown_result_is_refused(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    record = {"date": "", "gpus": ["A"], "driver": "", "versions": {}, "items": [{"name": "router", "result": "fine"}]}
    (tmp_path / "one.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"one.json: item 'router': result 'fine' is none of"):
        modules["gpu_page"].read_records(tmp_path)


def test_without_a_gpu_it_says_so(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(modules["gpu"], "gpu_names", list)
    assert modules["gpu"].main([]) == 2
    assert "there is no GPU here; --rehearse" in capsys.readouterr().err
    assert modules["gpu"].main(["--list"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(modules["gpu_items"].ITEMS)
    assert all("needs" in line for line in said)
