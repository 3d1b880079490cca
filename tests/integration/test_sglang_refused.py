"""Servers that cannot return routes say so: to a request with HTTP 400, or by not starting."""

import importlib.util
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from r3_adapter import processes
from r3_adapter.proof.tiny import ENGINE
from r3_adapter.sglang.settings import EngineSettings

SPEC = importlib.util.spec_from_file_location("sglang_server", Path(__file__).with_name("sglang_server.py"))
sglang = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sglang)
Server, make_prompts = sglang.Server, sglang.make_prompts

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def _write_dense(folder: Path) -> Path:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": sglang.VOCAB, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    more = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **more, dtype=torch.float32)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A dense model, asked for routes, while the other server starts."""
    folder = tmp_path_factory.mktemp("dense")
    settings = EngineSettings(str(_write_dense(folder / "model")), dtype="float32", **ENGINE)
    with (folder / "log").open("wb") as out:
        environment = sglang.on_cores(sglang.environment_of(folder), [1])
        process = processes._start(sglang.command(settings), environment, out)
    process.log = folder / "log"
    yield process
    sglang.end(process)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, dense: object) -> Iterator[Server]:
    """A server that was not started for routes."""
    folder = tmp_path_factory.mktemp("server")
    weights = {"v1": sglang.write_checkpoint(folder / "v1", 0)}
    extra = {"enable_return_routed_experts": False, "skip_tokenizer_init": False}
    settings = EngineSettings(str(weights["v1"]), dtype="float32", routed_experts_format="flat", extra=extra, **ENGINE)
    with sglang.serve(folder, weights, settings) as found:
        yield found


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_a_server_that_was_not_started_for_routes_says_so(server: Server, path: str) -> None:
    (prompt,) = make_prompts(0, [9])
    body = {
        "/generate": {"input_ids": prompt, "sampling_params": {"max_new_tokens": 4}},
        "/v1/completions": {"model": "m", "prompt": prompt, "max_tokens": 4},
        "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "t5 t6"}], "max_tokens": 4},
    }[path]
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post(path, {**body, "return_routed_experts": True})
    assert refused.value.code == 400
    assert "--enable-return-routed-experts" in refused.value.read().decode()
    server.post(path, body)


def test_a_dense_model_does_not_start(dense: Any) -> None:
    dense.wait(sglang.TIMEOUT)
    assert "Qwen3ForCausalLM has no MoE layer whose experts could be captured" in dense.log.read_text(errors="replace")
