"""Hugging Face's own model as a rollout, where SGLang cannot run one: routes of its routers, a share of them perturbed.

B: samples; S: tokens of the longest sample; T: tokens of a forward pass, B times those of a sample; M: MoE layers;
K: experts a token; E: experts; V: vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

from r3_adapter.errors import CaptureError
from r3_adapter.report import ProgressCallback
from r3_adapter.rollout import Sample
from r3_adapter.sglang.meta_model import modules_of
from r3_adapter.sglang.moe_config import MoEConfig, read_config
from r3_adapter.sglang.perturb import Perturbation
from r3_adapter.trace import NOT_CAPTURED, RoutingTrace, ids_dtype

Choose = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Given a layer id, the router's ids [T, K] and the scores [T, E] that it took them from: the ids that it is to use."""


@dataclass(frozen=True)
class Request:
    """What one sample is of.

    prompt: token ids. response: the tokens to take, or how many to sample. temperature: of the distribution.
    """

    prompt: Sequence[int]
    response: Sequence[int] | int
    temperature: float = 1.0

    @classmethod
    def of(cls, sample: Sample) -> "Request":
        """Return the request that gives the tokens of a sample."""
        tokens = sample.trace.token_ids.tolist()
        at = sample.num_prompt_tokens
        return cls(tokens[:at], tokens[at:], sample.temperature)

    @property
    def length(self) -> int:
        return len(self.prompt) + (self.response if isinstance(self.response, int) else len(self.response))

    def given(self, at: int) -> int | None:
        """Return the token at a position, None if it is to be sampled."""
        if at < len(self.prompt):
            return self.prompt[at]
        return None if isinstance(self.response, int) else self.response[at - len(self.prompt)]


def hf_rollout(
    checkpoint: Path,
    requests: Sequence[Request],
    *,
    seed: int,
    perturb: Perturbation | None = None,
    replay: Sequence[RoutingTrace] | None = None,
    progress: ProgressCallback = lambda done, total: None,
) -> list[Sample]:
    """Generate token by token in float32, with a cache, all samples side by side; record what the experts were given.

    perturb: the share of routes that get other experts, among those that the router may choose; weights
        stay the family's own scores at them.
    replay: routes to use in place of the routers' choice, of samples with the same tokens.
    progress: in samples.

    Raises:
        CaptureError: A model whose routers are not known here, or whose experts were given others than were chosen.
    """
    model, moe = load(checkpoint), MoEConfig.from_checkpoint(checkpoint)
    if perturb is not None and replay is not None:
        raise CaptureError("a rollout is either perturbed or replayed, not both")
    generator = torch.Generator().manual_seed(seed)
    choose: Choose = lambda layer, ids, scores: ids  # noqa: E731
    if perturb is not None:
        choose = _perturbed(perturb)
    given = None if replay is None else _Replay(requests, replay, moe)
    watch = _Watch(model, moe, choose if given is None else given.choose)
    lengths = [request.length for request in requests]
    tokens = torch.zeros(len(requests), max(lengths), dtype=torch.long)
    logprobs = torch.zeros(len(requests), max(lengths))
    first, cache = min(len(request.prompt) for request in requests), None
    for i, request in enumerate(requests):
        tokens[i, :first] = torch.tensor(request.prompt[:first])
    temperatures = torch.tensor([request.temperature for request in requests])[:, None]
    rows = []
    with torch.no_grad(), watch:
        # The last token is sampled and never fed forward.
        for start, stop in _steps(first, max(lengths)):
            if given is not None:
                given.span = slice(start, stop)
            # Of a sample of n tokens, n - 1 are fed forward.
            watch.going = (torch.tensor(lengths) - 1 > start)[:, None].expand(-1, stop - start)
            out = model(tokens[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(watch.take(len(requests)))
            values = (out.logits[:, -1].float() / temperatures).log_softmax(dim=1)
            picked = torch.multinomial(values.exp(), 1, generator=generator)[:, 0]
            for i, request in enumerate(requests):
                token = request.given(stop) if stop < lengths[i] else 0
                tokens[i, stop] = picked[i] if token is None else token
            logprobs[:, stop] = values.gather(1, tokens[:, stop, None])[:, 0]
            progress(sum(length <= stop + 1 for length in lengths), len(lengths))
    found = torch.cat(rows, dim=1).numpy()
    return [
        _sample(request, tokens[i].numpy(), logprobs[i].numpy(), found[i], moe) for i, request in enumerate(requests)
    ]


def perturbed_hf_rollout(
    checkpoint: Path,
    *,
    seed: int,
    fraction: float,
    num_samples: int = 16,
    progress: ProgressCallback = lambda done, total: None,
) -> list[Sample]:
    """Generate from random prompts of 4 to 24 tokens, 12 to 32 tokens each, with a share of the routes perturbed.

    Samples are of different temperatures, so that no trainer passes that scores all at one.

    Raises:
        CaptureError: A model whose routers are not known here.
    """
    rng = np.random.default_rng(seed)
    vocab = read_config(checkpoint / "config.json")["vocab_size"]
    requests = [
        Request(rng.integers(3, vocab, rng.integers(4, 25)).tolist(), int(rng.integers(12, 33)), (1.0, 0.5, 1.7)[i % 3])
        for i in range(num_samples)
    ]
    perturb = Perturbation(seed, fraction) if fraction else None
    return hf_rollout(checkpoint, requests, seed=seed, perturb=perturb, progress=progress)


def load(checkpoint: Path) -> Any:
    """Return the checkpoint's model in float32, to be evaluated.

    In plain torch its mixers of Mamba hold steps above time_step_min, which is for initialization, and which neither
    its own kernels nor Megatron's do.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    for module in model.modules():
        if hasattr(module, "time_step_min"):
            module.time_step_min = 0.0
    return model


def _steps(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the positions that each forward pass computes: those that all prompts have, then one after the other."""
    yield 0, first
    for at in range(first, last - 1):
        yield at, at + 1


def _sample(
    request: Request,
    tokens: npt.NDArray[np.int64],
    logprobs: npt.NDArray[np.float32],
    rows: npt.NDArray[Any],
    moe: MoEConfig,
) -> Sample:
    """Make a sample; tokens, logprobs: [S]; rows: [S - 1, M, K]."""
    length = request.length
    topk_ids = np.zeros((length, *rows.shape[1:]), ids_dtype(moe.num_experts))
    topk_ids[:-1] = rows[: length - 1]
    version_ids = np.zeros(length, np.int32)
    version_ids[-1] = NOT_CAPTURED
    trace = RoutingTrace(
        topk_ids=topk_ids,
        token_ids=tokens[:length].astype(np.int32),
        version_ids=version_ids,
        layer_ids=np.asarray(moe.layer_ids, np.int32),
        num_experts=moe.num_experts,
        weight_versions=("default",),
    )
    num_prompt_tokens = len(request.prompt)
    return Sample(
        trace, num_prompt_tokens, logprobs[num_prompt_tokens:length].copy(), temperature=float(request.temperature)
    )


def _perturbed(perturb: Perturbation) -> Choose:
    generator = torch.Generator().manual_seed(perturb.seed)

    def choose(layer: int, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Experts of groups that a router left out have no score, or none but zero.
        allowed = torch.isfinite(scores) & (scores != 0)
        noise = torch.rand(scores.shape, generator=generator).masked_fill(~allowed, -1)
        others = noise.topk(ids.shape[-1], dim=-1)
        replaced = torch.rand(scores.shape[:-1], generator=generator) < perturb.fraction
        replaced &= (others.values >= 0).all(dim=-1)
        return torch.where(replaced[..., None], others.indices, ids)

    return choose


class _Replay:
    """Chooses the experts of traces; span: the positions of the forward pass."""

    def __init__(self, requests: Sequence[Request], traces: Sequence[RoutingTrace], moe: MoEConfig) -> None:
        if len(traces) != len(requests):
            raise CaptureError(f"routes of {len(traces)} samples != {len(requests)} requests")
        self.traces, self.span = traces, slice(0, 0)
        self.column = {layer: at for at, layer in enumerate(moe.layer_ids)}

    def choose(self, layer: int, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        given = ids.reshape(len(self.traces), -1, ids.shape[-1]).clone()
        for row, trace in zip(given, self.traces, strict=True):
            # Behind a sample's end nothing is looked at.
            routes = trace.topk_ids[self.span, self.column[layer]][trace.captured[self.span]]
            row[: len(routes)] = torch.from_numpy(routes.astype(np.int64))
        return given.reshape(ids.shape)


class _Watch(TorchFunctionMode):
    """While it is entered, routers take the experts that `choose` says, and what experts are given is recorded.

    Families select in as many ways as there are families, but all with torch.topk over the scores of all experts, and
    take weights from what it returns or from their scores at its ids. So the ids are exchanged there.

    going: [B, s] bool; the tokens of a forward pass whose sample is not done.

    Raises:
        CaptureError: A layer whose experts get other ids than were chosen, or whose router chose in another way.
    """

    def __init__(self, model: Any, moe: MoEConfig, choose: Choose) -> None:
        super().__init__()
        self.moe, self.choose = moe, choose
        self.going = torch.ones(0, dtype=torch.bool)
        self._layer: int | None = None
        self._chosen: dict[int, torch.Tensor] = {}
        self._given: dict[int, torch.Tensor] = {}
        modules = modules_of(model, type(model).__name__)
        self._blocks = {layer: modules.moe_modules(layer) for layer in moe.layer_ids}
        # Nothing chooses there: experts follow from the token.
        self._hashed = {layer for layer in moe.layer_ids if modules.is_hashed(layer)}
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> "_Watch":
        for layer, (block, experts) in self._blocks.items():
            before = lambda module, args, layer=layer: self._begin(layer)  # noqa: E731
            after = lambda module, args, out: self._begin(None)  # noqa: E731
            given = lambda module, args, kwargs, layer=layer: self._record(layer, args, kwargs)  # noqa: E731
            for handle in (
                block.register_forward_pre_hook(before),
                block.register_forward_hook(after),
                experts.register_forward_pre_hook(given, with_kwargs=True),
            ):
                self._hooks.callback(handle.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._layer is None or getattr(func, "__name__", "") != "topk":
            return out
        scores, ids = args[0] if args else (kwargs or {})["input"], out[1]
        if scores.shape[-1] != self.moe.num_experts or ids.shape[-1] != self.moe.topk:
            return out
        layer = self._layer
        # What is chosen is chosen once.
        if layer in self._chosen:
            raise CaptureError(f"layer {layer}: its router chose experts twice in one forward pass")
        new = self.choose(layer, ids, scores)
        # Samples that are done are fed on beside the others, as they would be without anybody's choice.
        self._chosen[layer] = new = torch.where(self.going.reshape(*ids.shape[:-1], 1), new, ids)
        return torch.return_types.topk((scores.gather(-1, new), new))

    def take(self, num_samples: int) -> torch.Tensor:
        """Return what the experts of all layers were given in a forward pass, [B, s, M, K], and forget it."""
        missing = sorted(self._blocks.keys() - self._given.keys())
        if missing:
            raise CaptureError(f"layer {missing[0]}: its experts were not called in a forward pass")
        rows = [self._given[layer].reshape(num_samples, -1, self.moe.topk) for layer in self.moe.layer_ids]
        self._chosen.clear()
        self._given.clear()
        return torch.stack(rows, dim=2)

    def _begin(self, layer: int | None) -> None:
        self._layer = layer

    def _record(self, layer: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        found = [each for each in (*args, *kwargs.values()) if _is_ids(each)]
        if len(found) != 1 or found[0].shape[-1] != self.moe.topk:
            raise CaptureError(f"layer {layer}: which of its experts' arguments are ids is not known")
        ids, chosen = found[0], self._chosen.get(layer)
        if layer in self._hashed and chosen is None:
            chosen = ids
        if chosen is None or not torch.equal(ids.reshape(-1, self.moe.topk), chosen.reshape(-1, self.moe.topk)):
            raise CaptureError(f"layer {layer}: its experts were given other ids than its router was told to choose")
        self._given[layer] = ids.detach().clone()


def _is_ids(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool
