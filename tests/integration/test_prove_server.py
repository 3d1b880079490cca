"""r3 prove --url: a real server in bfloat16, whose natural differences are the signal; and one with a fault."""

import base64
import importlib.util
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter.layout import ParallelLayout
from r3_adapter.proof.server import prove_server
from r3_adapter.proof.tiny import ENGINE, TinyModel, write_checkpoint
from r3_adapter.sglang.computation import read_computations
from r3_adapter.sglang.settings import EngineSettings

SPEC = importlib.util.spec_from_file_location("sglang_server", Path(__file__).with_name("sglang_server.py"))
sglang = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sglang)
Server = sglang.Server

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]
SAMPLES = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    # A GPU's kernels have no smaller heads.
    write_checkpoint(
        folder / "v1", dtype="bfloat16", seed=5, shape=TinyModel(hidden_size=256 if sglang.has_gpu() else 64)
    )
    sglang.write_tokenizer(folder / "v1")
    machine = json.loads(os.environ.get("SGLANG_ARGS") or "{}")
    extra = {**machine, "weight_version": "v1", "skip_tokenizer_init": False}
    settings = EngineSettings(
        str(folder / "v1"), dtype="bfloat16", radix_cache=True, overlap=True, extra=extra, **ENGINE
    )
    with sglang.serve(folder, {"v1": folder / "v1"}, settings) as found:
        yield found


class Faulty(ThreadingHTTPServer):
    """Stands in front of a server, whose routes it gives to the token after the one that they belong to."""

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.url = url, f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Faulty

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: bytes | None) -> None:
        request = urllib.request.Request(self.server.behind + self.path, body, {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=sglang.TIMEOUT) as said:
            answer = json.loads(said.read())
        for reply in answer if isinstance(answer, list) else [answer]:
            for place in (reply.get("meta_info"), reply.get("sglext")):
                if place and "routed_experts" in place:
                    place["routed_experts"] = shifted(place["routed_experts"])
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def shifted(payload: str) -> str:
    (computation,) = read_computations(base64.b64decode(payload))
    rows = computation.trace.topk_ids.copy()
    rows[:-1] = np.roll(rows[:-1], 1, axis=0)
    return base64.b64encode(replace(computation.trace, topk_ids=rows).to_bytes()).decode()


@pytest.fixture(scope="module")
def faulty(server: Server) -> Iterator[str]:
    with Faulty(server.url) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found.url
        found.shutdown()
        thread.join()


def test_a_server_is_proved(server: Server, tmp_path: Path) -> None:
    """By the command, at the OpenAI endpoints."""
    report = tmp_path / "verdict.json"
    words = ["--url", server.url, "--api", "openai", "--model", str(server.weights["v1"]), "--samples", str(SAMPLES)]
    command = [sys.executable, "-m", "r3_adapter.cli", "prove", *words, "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=sglang.TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    assert "r3 prove: passed: " in done.stderr
    found = json.loads(report.read_text())
    assert (found["passed"], found["samples"], found["trainer_dtypes"]) == (True, SAMPLES, ["bfloat16", "float32"])
    assert found["server"]["dtype"] == "bfloat16" and found["server"]["weight_version"] == "v1"
    assert 0.03 < found["routes_naturally_other"] / found["routes"] < 0.5
    # The engine rounds as the trainer does, whose routers, live, are off by several times as much.
    spreads = {name: found["evidence"][name]["mean"] for name in ("floor", "replay", "live", "shifted")}
    assert spreads["replay"] < 1.5 * spreads["floor"]
    assert spreads["shifted"] > 3 * spreads["live"] > 9 * spreads["replay"]


@pytest.mark.parametrize("api", ["generate", "openai"])
def test_shifted_routes_are_noticed(server: Server, faulty: str, api: str) -> None:
    verdict = prove_server(faulty, server.weights["v1"], ParallelLayout(), api=api, num_samples=SAMPLES)
    assert not verdict.passed and not verdict.proved_nothing
    assert verdict.sentence.startswith("failed: largest gap after replay ")
    assert verdict.evidence.replay.mean > 3 * verdict.evidence.live.mean
