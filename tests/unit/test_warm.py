"""A process that is forked from one that has imported everything is as one that was started."""

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("warm_client", Path(__file__).parents[1] / "warm" / "client.py")
warm = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(warm)

SAYS = """
import json, os, sys, tempfile
places = [sys.path[0], os.getcwd(), os.environ["WORD"], tempfile.gettempdir()]
print(json.dumps([sys.argv, __name__, *places, os.getsid(0)]))
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def server() -> Iterator[warm.Server]:
    server = warm.Server("json", [], dict(os.environ))
    yield server
    server.close()


def test_it_has_its_own_arguments_environment_and_exit_code(server: warm.Server, tmp_path: Path) -> None:
    script = tmp_path / "says.py"
    script.write_text(SAYS)
    environment = {**os.environ, "WORD": "so", "TMPDIR": str(tmp_path)}
    with (tmp_path / "out").open("wb") as out:
        process = server.start([str(script), "3"], environment, out)
    assert (process.wait(60), process.poll()) == (3, 3)
    said = json.loads((tmp_path / "out").read_text())
    assert said == [[str(script), "3"], "__main__", str(tmp_path), os.getcwd(), "so", str(tmp_path), process.pid]


def test_what_it_raises_is_said(server: warm.Server, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise ValueError('so it is')")
    with (tmp_path / "out").open("wb") as out:
        assert server.start([str(tmp_path / "fails.py")], os.environ, out).wait(60) == 1
    assert (tmp_path / "out").read_text().splitlines()[-1] == "ValueError: so it is"


def test_it_ends_with_who_started_it(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text("import time; time.sleep(600)")
    server = warm.Server("json", [], dict(os.environ))
    try:
        with (tmp_path / "out").open("wb") as out:
            killed, left = (server.start([str(tmp_path / "waits.py")], os.environ, out) for _ in range(2))
        assert killed.poll() is None
        killed.kill()
        assert killed.wait(60) == -9
    finally:
        server.close()
    assert left.wait(60) == -9
    assert not Path(f"/proc/{left.pid}").exists()


def test_a_command_that_is_not_known_is_started_as_ever(tmp_path: Path) -> None:
    with warm.Servers(lambda *_: "cold") as servers, (tmp_path / "out").open("wb") as out:
        for command in (["sh", "x"], [sys.executable, "-c", "1"], [sys.executable, "-m", "r3_adapter.cli"]):
            assert servers.start(command, {}, out) == "cold"
