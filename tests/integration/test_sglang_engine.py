"""The patched SGLang: with the option off it is the released one; with it on, its routes are those that were used."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter.errors import CaptureError
from r3_adapter.patch import packages
from r3_adapter.patch.series import load_series, write_upstream_tests
from r3_adapter.processes import run_together
from r3_adapter.proof.tiny import ENGINE
from r3_adapter.rollout import Sample, save_samples
from r3_adapter.sglang.capture import payload_of
from r3_adapter.sglang.cpu import cpu_environment
from r3_adapter.sglang.engine import native_bytes, rollout_in_subprocess, samples_of
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.perturb import Perturbation
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.trace import RoutingTrace

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

VOLATILE = {"id", "e2e_latency", "response_sent_to_client_ts"}
RESCORE = Path(__file__).parents[2] / "benchmarks" / "paper" / "rescore.py"
MOE_LAYERS = (0, 1, 2, 3)
TIMEOUT = 300


def _release() -> str:
    try:
        return distribution("sglang").version
    except PackageNotFoundError:
        return ""


SERIES = {series.version: series for series in load_series().get("sglang", ())}
if _release() not in SERIES:
    pytest.skip("sglang is not installed in a version with patches", allow_module_level=True)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two folders for PYTHONPATH, SGLang as released and patched: links to what is installed, but for touched files."""
    installed = distribution("sglang")
    folders = sorted({file.parts[0] for file in installed.files or () if file.parts[0].startswith("sglang")})
    sites = {}
    for name, move in (("released", packages.revert), ("patched", packages.apply)):
        sites[name] = tmp_path_factory.mktemp(name)
        for folder in folders:
            source = Path(str(installed.locate_file(folder)))
            shutil.copytree(source, sites[name] / folder, copy_function=os.symlink)
        move(["sglang"], site=sites[name])
    return sites


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers in float32. SGLang takes every layer of this architecture for an MoE layer."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    more = {"norm_topk_prob": True, "max_position_embeddings": 1024, "initializer_range": 0.2, "dtype": torch.float32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts, **more)).save_pretrained(folder)
    return folder


# A single token, several chunks of prefill, an early stop. Greedy: the released engine, too, samples differently from
# one run to the next when the machine is busy.
REQUESTS: list[tuple[int, dict[str, Any]]] = [
    (1, {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True}),
    (40, {"temperature": 0.0, "max_new_tokens": 32, "ignore_eos": True}),
    (600, {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}),
    (12, {"temperature": 0.0, "max_new_tokens": 64, "stop_token_ids": list(range(60))}),
    (12, {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True}),
]
BATCH = [(length, {"temperature": 1.0, "max_new_tokens": 48, "ignore_eos": True}) for length in range(3, 35, 2)]


def _prompts(requests: Sequence[tuple[int, Mapping[str, Any]]]) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 512, length).tolist() for length, _ in requests]


@pytest.fixture(scope="module")
def replies(sites: dict[str, Path], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each engine replied: one request after the other, so that all of them see the same batches."""
    folder = tmp_path_factory.mktemp("replies")
    shared: Any = {"model_path": str(checkpoint), "dtype": "float32", **ENGINE}
    flat = EngineSettings(**shared, routed_experts_format="flat")
    perturbed = EngineSettings(**shared, overlap=True, perturb=Perturbation(1, 0.2))
    runs = {
        "released": ("released", flat, REQUESTS, 1),
        "flat": ("patched", flat, REQUESTS, 1),
        "safetensors": ("patched", EngineSettings(**shared), REQUESTS, 1),
        "perturbed": ("patched", perturbed, BATCH, len(BATCH)),
    }
    commands, environments = [], []
    for core, (name, (site, settings, requests, batch_size)) in enumerate(runs.items()):
        request = {"settings": settings.to_json(), "replies": True, "batch_size": batch_size}
        request |= {"input_ids": _prompts(requests), "sampling_params": [params for _, params in requests]}
        path = folder / f"{name}.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        commands.append([sys.executable, "-m", "r3_adapter.sglang.worker", str(path), str(folder / name)])
        environments.append(_environment(sites[site], core % (os.cpu_count() or 1)))
    for pair in (slice(0, 2), slice(2, 4)):
        run_together(commands[pair], env=environments[pair], timeout=TIMEOUT)
    return {name: json.loads((folder / f"{name}.replies.json").read_text(encoding="utf-8")) for name in runs}


def _environment(site: Path, core: int) -> dict[str, str]:
    environment = cpu_environment()
    paths = [str(site), environment.get("PYTHONPATH") or os.environ.get("PYTHONPATH", "")]
    if environment:
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = str(core)
    return {**environment, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


@pytest.fixture(scope="module")
def moe(checkpoint: Path) -> MoEConfig:
    return MoEConfig.from_checkpoint(checkpoint)


def test_with_the_option_off_the_patched_engine_is_the_released_one(replies: dict[str, Any]) -> None:
    for released, patched in zip(replies["released"], replies["flat"], strict=True):
        assert released["meta_info"].keys() == patched["meta_info"].keys()
        for reply in (released, patched):
            reply["meta_info"] = {key: value for key, value in reply["meta_info"].items() if key not in VOLATILE}
        assert patched == released


def test_routes_are_those_of_the_native_payload_and_bound_to_the_tokens(
    replies: dict[str, Any], moe: MoEConfig
) -> None:
    assert moe == MoEConfig(8, 2, MOE_LAYERS, 4)
    prompts = _prompts(REQUESTS)
    native = samples_of(replies["flat"], prompts, moe, native=True)
    compact = samples_of(replies["safetensors"], prompts, moe)
    for one, other, prompt, reply in zip(native, compact, prompts, replies["flat"], strict=True):
        # The native form does not say which model it is of.
        assert replace(one.trace, model=other.trace.model) == other.trace
        assert other.trace.token_ids.tolist() == [*prompt, *reply["output_ids"]]
        assert other.trace.captured.tolist() == [True] * (other.trace.num_tokens - 1) + [False]
        assert other.trace.layer_ids.tolist() == list(MOE_LAYERS)
        assert other.trace.weight_versions == ("default",)
        assert np.array_equal(one.logprobs, other.logprobs)
        assert one.payload_bytes == native_bytes(one.trace.num_tokens, moe)
        assert other.payload_bytes < 1000 + other.trace.num_tokens * (moe.topk * len(MOE_LAYERS) + 8)
    lengths = [sample.num_response_tokens for sample in compact]
    assert lengths[:3] == [16, 32, 8]
    assert 1 < lengths[3] < 64


def test_a_payload_names_its_model_and_has_a_checksum(replies: dict[str, Any]) -> None:
    for reply in replies["safetensors"]:
        payload = bytes(payload_of(reply, "reply"))
        size = int.from_bytes(payload[:8], "little")
        metadata = json.loads(payload[8 : 8 + size])["__metadata__"]
        assert json.loads(metadata["model"]) == {"num_layers": 4, "hidden_size": 64, "vocab_size": 512}
        field = f'"checksum":"{metadata["checksum"]}"'.encode()
        zeros = payload[: 8 + size].replace(field, b'"checksum":"00000000"') + payload[8 + size :]
        assert f"{zlib.crc32(zeros):08x}" == metadata["checksum"]


def test_routes_are_those_of_a_reference_model(replies: dict[str, Any], moe: MoEConfig, checkpoint: Path) -> None:
    for sample in samples_of(replies["safetensors"], _prompts(REQUESTS), moe):
        routes, logprobs = _reference(checkpoint, sample, replayed=None)
        captured = sample.trace.topk_ids[:-1]
        assert np.array_equal(np.sort(routes[:-1], axis=2), np.sort(captured, axis=2))
        np.testing.assert_allclose(sample.logprobs, logprobs, atol=1e-4, rtol=0)


def test_perturbed_routes_are_captured_as_they_were_used(
    replies: dict[str, Any], moe: MoEConfig, checkpoint: Path
) -> None:
    changed, total, far = 0, 0, 0.0
    for sample in samples_of(replies["perturbed"], _prompts(BATCH), moe):
        routes, logprobs = _reference(checkpoint, sample, replayed=sample.trace)
        np.testing.assert_allclose(sample.logprobs, logprobs, atol=1e-4, rtol=0)
        captured = sample.trace.topk_ids[:-1]
        # At the same hidden states the reference would have chosen differently in the perturbed rows.
        changed += int((np.sort(routes[:-1], axis=2) != np.sort(captured, axis=2)).any(axis=2).sum())
        total += captured[..., 0].size
        _, live = _reference(checkpoint, sample, replayed=None)
        far = max(far, float(np.abs(live - sample.logprobs).max()))
    # A random pair is the router's own once in 28.
    assert abs(changed / total - 0.2 * 27 / 28) < 0.03
    assert far > 0.5


def test_an_engine_finds_its_rollout_as_likely_in_one_go(
    replies: dict[str, Any], moe: MoEConfig, checkpoint: Path, tmp_path: Path
) -> None:
    samples = samples_of(replies["safetensors"], _prompts(REQUESTS), moe)
    save_samples(tmp_path / "samples", samples)
    settings, out = EngineSettings(str(checkpoint), dtype="float32", **ENGINE).to_json(), tmp_path / "out.npy"
    command = [sys.executable, str(RESCORE), settings, str(tmp_path / "samples"), str(out)]
    run_together([command], env=[cpu_environment()], timeout=TIMEOUT)
    found = np.load(out)
    np.testing.assert_allclose(found, np.concatenate([sample.logprobs for sample in samples]), atol=1e-4, rtol=0)


def test_an_engine_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"^rollout: .*config\.json: cannot be read"):
        rollout_in_subprocess(EngineSettings(str(tmp_path)), [[1]], {}, timeout=TIMEOUT)


def test_upstream_tests_of_the_series_pass(sites: dict[str, Path], tmp_path: Path) -> None:
    tests = write_upstream_tests(SERIES[_release()], tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *map(str, tests)]
    environment = {**os.environ, **_environment(sites["patched"], 0)}
    ran = subprocess.run(
        command, env=environment, cwd=tmp_path, timeout=TIMEOUT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-4000:]


def _reference(checkpoint: Path, sample: Sample, replayed: RoutingTrace | None) -> tuple[Any, Any]:
    """Return the reference's own routes [S, M, K] and log-probabilities [R], with the trace's routes replayed."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    own: list[torch.Tensor] = []

    def route(module: Any, args: Any, output: Any) -> Any:
        probs, ids = output[0].softmax(dim=-1), output[2].clone()
        layer = len(own)
        own.append(output[2].clone())
        if replayed is not None:
            ids[:-1] = torch.from_numpy(replayed.topk_ids[:-1, layer].astype(np.int64))
        weights = probs.gather(1, ids)
        return output[0], weights / weights.sum(dim=-1, keepdim=True), ids

    for layer in MOE_LAYERS:
        model.model.layers[layer].mlp.gate.register_forward_hook(route)
    tokens = torch.from_numpy(sample.trace.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        logprobs = model(tokens).logits[0].log_softmax(dim=-1)
    first = sample.num_prompt_tokens
    picked = logprobs[first - 1 : -1].gather(1, tokens[0, first:, None])[:, 0]
    return torch.stack(own, dim=1).numpy(), picked.numpy()
