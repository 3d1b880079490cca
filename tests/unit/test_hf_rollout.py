"""Hugging Face's models as rollouts: their routes replay to the bit, and a row that is moved shows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r3_adapter.errors import CaptureError, UnknownModelError
from r3_adapter.proof.models import families, write_model
from r3_adapter.rollout import Sample
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.perturb import Perturbation

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from r3_adapter.proof.hf_rollout import Request, hf_rollout  # noqa: E402


def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    sizes = ((4, 9, 1.0), (11, 12, 0.5), (7, 3, 1.7))
    return [Request(rng.integers(3, 500, prompt).tolist(), response, t) for prompt, response, t in sizes]


def again(samples: list[Sample]) -> list[Request]:
    """The same tokens."""
    return [Request.of(sample) for sample in samples]


@pytest.mark.parametrize("family", families())
def test_own_routes_give_own_log_probabilities_to_the_bit(family: str, tmp_path: Path) -> None:
    write_model(family, tmp_path, dtype="float32", seed=0)
    moe = MoEConfig.from_checkpoint(tmp_path)
    samples = hf_rollout(tmp_path, requests(), seed=0, perturb=Perturbation(seed=0, fraction=0.2))
    traces = [sample.trace for sample in samples]
    for sample, request in zip(samples, requests(), strict=True):
        trace = sample.trace
        assert trace.token_ids[: sample.num_prompt_tokens].tolist() == request.prompt
        assert trace.layer_ids.tolist() == list(moe.layer_ids) and trace.topk == moe.topk
        assert trace.captured.tolist() == [True] * (request.length - 1) + [False]
    replayed = hf_rollout(tmp_path, again(samples), seed=1, replay=traces)
    live = hf_rollout(tmp_path, again(samples), seed=1)
    for sample, same, other in zip(samples, replayed, live, strict=True):
        assert np.array_equal(sample.logprobs, same.logprobs)
        assert np.array_equal(sample.trace.topk_ids, same.trace.topk_ids)
        assert np.array_equal(sample.trace.token_ids, other.trace.token_ids)
    # The first layer's input is the same with live routers, so only rows that were perturbed differ.
    rows = [np.sort(np.concatenate([s.trace.topk_ids[:-1, 0] for s in each]), axis=1) for each in (samples, live)]
    assert 0.05 < (rows[0] != rows[1]).any(axis=1).mean() < 0.5
    assert max(np.abs(s.logprobs - other.logprobs).max() for s, other in zip(samples, live, strict=True)) > 1e-2
    # One row of one layer, of a token behind which another is sampled.
    moved = traces[1].topk_ids.copy()
    at = 12
    moved[at, -1] = (moved[at, -1].astype(int) + 1) % moe.num_experts
    wrong = hf_rollout(
        tmp_path, again(samples), seed=1, replay=[traces[0], replace(traces[1], topk_ids=moved), traces[2]]
    )
    assert np.abs(wrong[1].logprobs - samples[1].logprobs).max() > 1e-3


def test_a_sample_is_scored_as_in_one_forward_pass(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_model("olmoe", tmp_path, dtype="float32", seed=0)
    (sample, *_) = hf_rollout(tmp_path, requests(), seed=0)
    tokens = torch.from_numpy(sample.trace.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(tokens).logits[0]
    first = sample.num_prompt_tokens
    picked = logits.log_softmax(dim=-1)[first - 1 : -1].gather(1, tokens[0, first:, None])[:, 0].numpy()
    np.testing.assert_allclose(sample.logprobs, picked, atol=1e-4, rtol=0)


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    write_model("olmoe", tmp_path, dtype="float32", seed=0)
    samples = hf_rollout(tmp_path, requests(), seed=0)
    with pytest.raises(CaptureError, match="routes of 1 samples != 3 requests"):
        hf_rollout(tmp_path, again(samples), seed=0, replay=[samples[0].trace])
    with pytest.raises(CaptureError, match="not both"):
        hf_rollout(
            tmp_path, requests(), seed=0, perturb=Perturbation(seed=0, fraction=0.2), replay=[s.trace for s in samples]
        )
    assert issubclass(UnknownModelError, CaptureError)


def test_a_router_that_chooses_in_another_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    def sort(self: torch.nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(hidden, self.weight)
        scores, ids = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        return logits, scores[:, : self.top_k], ids[:, : self.top_k]

    write_model("olmoe", tmp_path, dtype="float32", seed=0)
    monkeypatch.setattr(OlmoeTopKRouter, "forward", sort)
    with pytest.raises(CaptureError, match="layer 0: its experts were given other ids"):
        hf_rollout(tmp_path, requests(), seed=0)
