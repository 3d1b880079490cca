"""Routes handed over in shared memory: those that a reply would carry, and nothing is left behind."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from r3_adapter.proof.tiny import ENGINE
from r3_adapter.sglang.engine import generate_over_http
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.perturb import Perturbation
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.watchdog import MEMORY

SPEC = importlib.util.spec_from_file_location("sglang_server", Path(__file__).with_name("sglang_server.py"))
sglang = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sglang)
Server, make_prompts = sglang.Server, sglang.make_prompts

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    weights = {"v1": sglang.write_checkpoint(folder / "v1", 0)}
    memory = tempfile.mkdtemp(prefix="r3-test-", dir=MEMORY)
    request.addfinalizer(lambda: shutil.rmtree(memory, ignore_errors=True))
    # Of a server that was killed.
    (Path(memory) / ("0" * 32)).write_bytes(b"left")
    extra = {"routed_experts_dir": memory, "weight_version": "v1"}
    settings = EngineSettings(
        str(weights["v1"]),
        dtype="float32",
        radix_cache=True,
        overlap=True,
        perturb=Perturbation(1, 0.2),
        extra=extra,
        **ENGINE,
    )
    with sglang.serve(folder, weights, settings) as found:
        assert os.listdir(memory) == []
        yield found
        assert os.listdir(memory) == []
        # What nobody reads goes with the server.
        with found.open("/generate", {"input_ids": [5, 6, 7], "return_routed_experts": True}) as answer:
            answer.read()
        assert len(os.listdir(memory)) == 1


@pytest.mark.parametrize("length", [12, 80])
def test_samples_of_one_prompt(server: Server, length: int) -> None:
    (prompt,) = make_prompts(1, [length])
    for reply in server.ask([prompt] * 8, 24):
        assert isinstance(reply["meta_info"]["routed_experts"], bytes)
        server.check(reply, prompt)


def test_samples_of_a_server_on_this_host(server: Server) -> None:
    prompts = make_prompts(4, [10, 30])
    moe = MoEConfig.from_checkpoint(server.weights["v1"])
    params = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    samples = generate_over_http(server.url, prompts, params, moe, shared_memory=server.shared_memory)
    for sample, prompt in zip(samples, prompts, strict=True):
        assert sample.trace.token_ids[: len(prompt)].tolist() == prompt
        assert sample.num_response_tokens == 8
