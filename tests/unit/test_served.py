"""What a server says of itself is believed as far as the checkpoint bears it out; and what its samples then prove."""

import base64
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter.cli import main
from r3_adapter.errors import CaptureError
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.proof import server as proof
from r3_adapter.proof.damage import damage, misplace
from r3_adapter.proof.scoring import Scores
from r3_adapter.proof.tiny import TinyModel, qwen3_moe_config
from r3_adapter.rollout import Sample
from r3_adapter.sglang.served import Served, ask, copy_with_dtype, served_at, sizes_of
from r3_adapter.trace import ModelId, RoutingTrace

SHAPE = TinyModel(num_layers=2, num_experts=8, topk=2, vocab_size=64)
MODEL = {"served_model_name": "m", "weight_version": "v1", "model_type": "qwen3_moe"}
INFO = {
    "version": "0.5.20",
    "dtype": "auto",
    "enable_return_routed_experts": True,
    "routed_experts_format": "safetensors",
    "sampling_backend": "pytorch",
}


class Fake(ThreadingHTTPServer):
    """Answers what `said` has for a path; a function is called with the request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.said: dict[str, Any] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: Any) -> None:
        said = self.server.said[self.path]
        data = json.dumps(said(body) if callable(said) else said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    qwen3_moe_config(SHAPE, "bfloat16").save_pretrained(folder)
    return folder


def test_what_a_server_is(fake: Fake, checkpoint: Path) -> None:
    fake.said = {"/model_info": MODEL, "/server_info": INFO}
    assert served_at(f"{fake.url}/", checkpoint) == Served(fake.url, "0.5.20", "m", "v1", "bfloat16", None)
    fake.said["/server_info"] = {**INFO, "dtype": "half", "quantization": "fp8"}
    found = served_at(fake.url, checkpoint)
    assert (found.dtype, found.quantization) == ("float16", "fp8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": []}, r"/model_info: \[\] is no JSON object"),
        ({"model": {**MODEL, "model_type": "mixtral"}}, "model_type 'mixtral' != 'qwen3_moe' of "),
        ({"model": {**MODEL, "architectures": "?"}}, r"architectures '\?' != \['Qwen3MoeForCausalLM'\]|!= None of"),
        ({"model": {**MODEL, "weight_version": None}}, "weight_version None is no word"),
        ({"model": {**MODEL, "served_model_name": "a\nb"}}, r"served_model_name 'a\\nb' is no word"),
        ({"enable_return_routed_experts": False}, "records no routes"),
        ({"routed_experts_format": "flat"}, "routed_experts_format 'flat' != 'safetensors'"),
        ({"routed_experts_format": None}, "routed_experts_format None != 'safetensors'"),
        ({"routed_experts_dir": "/dev/shm/x"}, "hands routes over in files of its host"),
        ({"dtype": "int8"}, "dtype 'int8' is none of float32, bfloat16, float16"),
        ({"dtype": ["bfloat16"]}, r"dtype \['bfloat16'\] is no word"),
        ({"version": "9" * 300}, "version '9+...9+' is no word"),
        ({"quantization": 8}, "quantization 8 is no word"),
        ({"sampling_backend": "mine"}, "what a sampler of your own scores is not known"),
        ({"preferred_sampling_params": {"top_k": 1}}, "preferred_sampling_params"),
    ],
)
def test_another_server_is_refused(fake: Fake, checkpoint: Path, change: dict[str, Any], message: str) -> None:
    model = change.pop("model", MODEL)
    fake.said = {"/model_info": model, "/server_info": {**INFO, **change}}
    with pytest.raises(CaptureError, match=message):
        served_at(fake.url, checkpoint)


def test_a_copy_is_of_the_same_weights_in_another_dtype(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    text = {"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 64, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "text_config": text}))
    copy = copy_with_dtype(folder, tmp_path / "copy", "float32")
    found = json.loads((copy / "config.json").read_text())
    del text["torch_dtype"]
    assert found == {"dtype": "float32", "text_config": {**text, "dtype": "float32"}}
    assert (copy / "model.safetensors").read_bytes() == b"weights"
    assert sizes_of(copy) == {"num_layers": 2, "hidden_size": 8, "vocab_size": 64}
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "hidden_size": 8.5}))
    with pytest.raises(CaptureError, match=r"config.json: hidden_size \(8.5\) is not a whole number"):
        sizes_of(folder)


def routes(token_ids: list[int], **changes: Any) -> str:
    """Return a payload as a server sends it."""
    return base64.b64encode(trace(token_ids, **changes).to_bytes()).decode()


def trace(token_ids: list[int], seed: int = 0, **changes: Any) -> RoutingTrace:
    size = len(token_ids)
    noise = np.random.default_rng(seed).random((size, SHAPE.num_layers, SHAPE.num_experts))
    topk_ids = noise.argsort(axis=-1)[..., : SHAPE.topk].astype(np.uint8)
    topk_ids[-1] = 0
    values: Mapping[str, Any] = {
        "topk_ids": topk_ids,
        "token_ids": np.array(token_ids, np.int32),
        "version_ids": np.array([*[0] * (size - 1), -1], np.int32),
        "layer_ids": np.arange(SHAPE.num_layers, dtype=np.int32),
        "num_experts": SHAPE.num_experts,
        "weight_versions": ("v1",),
        "model": ModelId(SHAPE.num_layers, SHAPE.hidden_size, SHAPE.vocab_size),
    }
    return RoutingTrace(**{**values, **changes})


def replies(**changes: Any) -> dict[str, Any]:
    """Return answers of all endpoints, whose tokens are 5, 6, 7 and so on."""

    def output(params: Mapping[str, Any], name: str) -> list[int]:
        return [5 + at for at in range(params[name])]

    def generate(body: Mapping[str, Any]) -> Any:
        (prompt,), params = body["input_ids"], body["sampling_params"]
        made = output(params, "max_new_tokens")
        pairs = [[-1.0, token, None] for token in made]
        info = {"finish_reason": {"type": "length"}, "output_token_logprobs": pairs, "weight_version": "v1"}
        return [{"output_ids": made, "meta_info": {**info, "routed_experts": routes([*prompt, *made], **changes)}}]

    def openai(body: Mapping[str, Any]) -> Any:
        prompt, made = body.get("input_ids") or body["prompt"], output(body, "max_tokens")
        chat = "messages" in body
        logprobs = {"content": [{"logprob": -1.0}] * len(made)} if chat else {"token_logprobs": [-1.0] * len(made)}
        choice = {"index": 0, "finish_reason": "length", "logprobs": logprobs}
        usage = {"prompt_tokens": len(prompt)}
        return {"choices": [choice], "usage": usage, "sglext": {"routed_experts": routes([*prompt, *made], **changes)}}

    return {"/generate": generate, "/v1/completions": openai, "/v1/chat/completions": openai}


SERVED = Served("", "0.5.20", "m", "v1", "bfloat16", None)
PROMPTS, LENGTHS = [[11, 12], [13, 14, 15], [16]], [4, 3, 5]


@pytest.mark.parametrize("api", ["generate", "openai"])
def test_samples_of_each_endpoint(fake: Fake, checkpoint: Path, api: Any) -> None:
    fake.said, done = replies(), list[int]()
    served = replace(SERVED, url=fake.url)
    samples = ask(served, api, PROMPTS, LENGTHS, checkpoint, progress=lambda at, of: done.append(at))
    assert done == [1, 2, 3]
    for sample, prompt, length in zip(samples, PROMPTS, LENGTHS, strict=True):
        assert sample.trace.token_ids.tolist() == [*prompt, *(5 + at for at in range(length))]
        assert (sample.num_prompt_tokens, sample.num_response_tokens) == (len(prompt), length)


@pytest.mark.parametrize("api", ["generate", "openai"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_versions": ("v2",)}, r"routes of weights \['v2'\] != 'v1', as the server says it has"),
        ({"model": ModelId(2, 128, 64)}, "routes of a model with hidden_size 128 != 64 of the checkpoint"),
        ({"model": None}, "its routes do not say which model they are of"),
        ({"num_experts": 9}, "routes of num_experts 9 != 8 of the model"),
    ],
)
def test_samples_of_another_model_are_refused(
    fake: Fake, checkpoint: Path, api: Any, changes: dict[str, Any], message: str
) -> None:
    fake.said = replies(**changes)
    with pytest.raises(CaptureError, match=message):
        ask(replace(SERVED, url=fake.url), api, PROMPTS, LENGTHS, checkpoint)


def judged(live: float, replay: float = 1e-3, fault: float = 0.0, quantization: str | None = None) -> Any:
    """Judge made-up scores, whose gaps are exponentially distributed with these means; fault: added to replay's."""
    rng = np.random.default_rng(0)
    samples = [
        Sample(trace([11, *rng.integers(3, 64, 40).tolist()], seed), 1, np.full(40, -5, np.float32))
        for seed in range(16)
    ]

    def scored(part: list[Sample], mean: float) -> list[Any]:
        return [(each.logprobs + rng.exponential(mean, 40)).astype(np.float32) for each in part]

    def scores(mean: float, equal: int) -> Scores:
        layers = {0: {"routes": 1280, "routes_equal": equal, "ids": 1, "ids_equal": 1}}
        return Scores(scored(samples, mean), layers, {}, None, {}, {}, "argument")

    wrong = [sample for sample, _ in misplace(samples, 0)]
    misplaced = scored(wrong, replay)
    for each in misplaced:
        each[7] += 1
    replayed = {
        "replay": (samples, scored(samples, replay + fault)),
        "shifted": (damage(samples, "shift-token"), scored(samples, 0.5)),
        "misplaced": (wrong, misplaced),
    }
    near = {"live": scores(live, 1280 - (128 if live > replay else 0)), "replay": scores(replay, 1280)}
    dtypes = ("float32", "float32") if live <= replay else ("bfloat16", "float32")
    passes = proof.Passes(dtypes, near, replayed, 100, 100)
    served = replace(SERVED, quantization=quantization)
    return proof.judge_server(served, "generate", samples, passes, ParallelLayout(), TrainerOptions(), {})


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_natural_differences_that_replay_takes_away_prove_it(quantization: str | None) -> None:
    verdict = judged(live=0.02, quantization=quantization)
    assert verdict.passed and not verdict.proved_nothing
    assert (verdict.evidence.floor is None) == (quantization is not None)
    assert (verdict.routes_naturally_other, verdict.routes, verdict.samples_visible) == (128, 1280, 16)
    assert verdict.sentence.startswith("passed: 128 of 1,280 routes (10.0%) have other experts where routed live")
    report = json.loads(json.dumps(verdict.to_json()))
    assert report["passed"] and report["evidence"]["seen_share"] == 1.0


def test_without_natural_differences_nothing_was_proved() -> None:
    verdict = judged(live=1e-3)
    assert not verdict.passed and verdict.proved_nothing
    assert verdict.sentence.startswith("nothing was proved: 0 of 1,280 routes (0.0%) have other experts")
    # Twice replay's mean times 640 tokens, at about 1 a route, are 2 routes.
    assert verdict.routes_needed == proof.MIN_ROUTES
    few = replace(judged(live=0.02), routes_naturally_other=proof.MIN_ROUTES - 1)
    assert not few.passed and few.proved_nothing
    assert few.sentence.startswith("nothing was proved: 99 of 1,280 routes (7.7%) have other experts")


def test_a_fault_of_all_routes_is_a_failure_and_not_a_lack_of_evidence() -> None:
    for live in (1e-3, 0.02):
        verdict = judged(live=live, fault=0.4)
        assert not verdict.passed and not verdict.proved_nothing
        assert verdict.sentence.startswith("failed: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--api", "openai"], "--api openai needs --url"),
        (["--samples", "9"], "--samples 9 needs --url"),
        (["--url", "http://127.0.0.1:1"], "--url http://127.0.0.1:1 needs --model"),
        (["--url", "http://127.0.0.1:1", "--model", "HERE", "--retract"], "--retract with --url"),
        (["--url", "http://127.0.0.1:1", "--model", "HERE", "--group", "2"], "--group with --url"),
        (
            ["--url", "http://127.0.0.1:1", "--model", "HERE", "--sglang-args", '{"tp_size": 2}'],
            "--sglang-args with --url",
        ),
        (["--url", "ftp://127.0.0.1:1", "--model", "HERE"], "is not http://HOST:PORT"),
    ],
)
def test_flags_that_do_not_go_together(
    words: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(checkpoint) if word == "HERE" else word for word in words]
    assert main(["prove", *words]) == 2
    assert message in capsys.readouterr().err
