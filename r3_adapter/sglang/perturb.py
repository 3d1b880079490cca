"""Make the rollout select other experts than its router would: a proof of replay needs routes far from the live ones.

The bits of a token's router logits, the layer and the seed decide, on the device, which routes are changed and which
experts they get. No random generator and no value from the host is involved, so a CUDA graph changes new routes at
each replay, all ranks that hold a token change its route alike, and a route is changed alike in every batch.

T: tokens; E: experts; R: routed experts a token; K: R and the columns of fused shared experts.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r3_adapter.errors import CaptureError

if TYPE_CHECKING:
    import torch

VARIABLE = "R3_PERTURB"
SWITCH = "R3_PERTURB_SWITCH"
"""Names a file of one byte: while it is "0", nothing is perturbed. Without the variable, all is."""
_ONE = 1 << 24
"""What the fraction 1 is in the integers that it is compared in."""


@dataclass(frozen=True)
class Perturbation:
    """Which share of routes gets R random experts instead of its own, and the seed of the choice."""

    seed: int
    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise CaptureError(f"perturbed fraction ({self.fraction}) outside 0 (excluded) to 1")

    @classmethod
    def parse(cls, text: str) -> "Perturbation":
        """Read "seed:fraction", as in the variable R3_PERTURB.

        Raises:
            CaptureError: It is something else.
        """
        seed, _, fraction = text.partition(":")
        try:
            return cls(int(seed), float(fraction))
        except ValueError as error:
            raise CaptureError(f"perturbation {text!r} != 'seed:fraction'") from error

    def __str__(self) -> str:
        return f"{self.seed}:{self.fraction}"

    @property
    def limit(self) -> int:
        """A route is replaced if its hash, of 24 bits, is below this."""
        return round(self.fraction * _ONE)

    def install(self) -> None:
        """Wrap what every selection goes through just before it is captured, whichever kernel selected.

        A router that hands over ids of its own (precomputed top-k) is not perturbed.

        Source: sglang@0.5.20: srt/layers/moe/topk.py:_post_process_topk_ids
        """
        from sglang.srt.layers.moe import topk

        inner, path = topk._post_process_topk_ids, os.environ.get(SWITCH)
        switch = None if path is None else _Switch(path, self.limit)

        def post_process(topk_ids: Any, topk_weights: Any, topk_config: Any, router_logits: Any, **others: Any) -> Any:
            limit = self.limit if switch is None else switch.limit_on(router_logits.device)
            layer = others.get("layer_id") or 0
            ids, weights = self.perturb(topk_ids, topk_weights, topk_config, router_logits, limit=limit, layer=layer)
            return inner(
                topk_ids=ids, topk_weights=weights, topk_config=topk_config, router_logits=router_logits, **others
            )

        topk._post_process_topk_ids = post_process

    def perturb(
        self,
        topk_ids: "torch.Tensor",
        topk_weights: "torch.Tensor",
        config: Any,
        router_logits: "torch.Tensor",
        *,
        limit: "torch.Tensor | int | None" = None,
        layer: int = 0,
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return ids and weights with a random share of the routes replaced; the other routes keep their bits.

        topk_ids: [T, K] integers; topk_weights: [T, K] float; router_logits: [T, E] float.
        config: SGLang's TopKConfig; the weights of a replaced route are its own scores at the new ids. Groups of
            experts are not respected. Columns of fused shared experts, which come last, keep their ids.
        limit: in place of the own one; a tensor on the device.

        Raises:
            CaptureError: The router weighs experts in a way that is not known here.
        """
        import torch

        routed = topk_ids.shape[1] - _shared_columns(config, topk_ids.shape[1])
        logits = router_logits.float()
        row = _hash_rows(logits, self.seed, layer)
        experts = torch.arange(1, logits.shape[1] + 1, device=logits.device, dtype=torch.int64)
        ids = _mix(row[:, None] + experts * _FACTORS[3]).topk(routed, dim=1).indices
        scores = _scores(config, logits)
        weights = _weights(config, scores, ids, topk_ids[:, :routed], topk_weights, routed)
        # Scores may all be below what float32 can tell from 0, and then say nothing of the new experts.
        told = scores.gather(1, ids).sum(dim=1, keepdim=True) > 0
        replaced = (((row >> 20) & (_ONE - 1)) < (self.limit if limit is None else limit))[:, None] & told
        new_ids = torch.cat([ids.to(topk_ids.dtype), topk_ids[:, routed:]], dim=1)
        return torch.where(replaced, new_ids, topk_ids), torch.where(
            replaced, weights.to(topk_weights.dtype), topk_weights
        )


class _Switch:
    """A perturbation's limit as a tensor on each device, which a file turns to 0 and back between forward passes.

    A graph reads the tensor, so it must be there before the graph is captured.
    """

    def __init__(self, path: str, limit: int) -> None:
        """Read the file before each forward pass.

        Source: sglang@0.5.20: srt/model_executor/model_runner.py:ModelRunner.forward
        """
        from sglang.srt.model_executor.model_runner import ModelRunner

        self._file, self._limit, self._on = os.open(path, os.O_RDONLY), limit, True
        self._limits: dict[torch.device, torch.Tensor] = {}
        inner = ModelRunner.forward

        def forward(*args: Any, **options: Any) -> Any:
            self._follow()
            return inner(*args, **options)

        ModelRunner.forward = forward

    def limit_on(self, device: "torch.device") -> "torch.Tensor":
        """Return the [] int64 tensor of a device, which stays the same one."""
        import torch

        if device not in self._limits:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise CaptureError("perturbation: a CUDA graph is captured before any forward pass")
            self._limits[device] = torch.full((), self._limit * self._on, dtype=torch.int64, device=device)
        return self._limits[device]

    def _follow(self) -> None:
        import torch

        on = os.pread(self._file, 1, 0) != b"0"
        if on != self._on:
            self._on = on
            with torch.inference_mode():
                for limit in self._limits.values():
                    limit.fill_(self._limit * on)


def _signed(value: int) -> int:
    """Return the 64 bits of a value as torch's int64 has them."""
    return value - (1 << 64) if value >> 63 else value


# Odd, and as many bits set as not. Source: D. Stafford's mix13, as in S. Vigna's splitmix64.
_FACTORS = [_signed(each) for each in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)]


def _mix(x: "torch.Tensor") -> "torch.Tensor":
    """Spread the bits of int64 values; shifts to the right are without sign."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _FACTORS[1]
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _FACTORS[2]
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _hash_rows(logits: "torch.Tensor", seed: int, layer: int) -> "torch.Tensor":
    """Return [T] int64 of [T, E] float32: a sum over experts, which has one value in whichever order it is summed."""
    import torch

    bits = logits.contiguous().view(torch.int32).to(torch.int64)
    places = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int64) * _FACTORS[0]
    start = _signed((seed * _FACTORS[3] + layer * _FACTORS[0]) & ((1 << 64) - 1))
    return _mix(_mix(bits + places).sum(dim=1) + start)


def _shared_columns(config: Any, columns: int) -> int:
    """Return how many columns are of fused shared experts; none if they are appended later."""
    if (function := config.custom_routing_function) is not None:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise CaptureError(f"perturbation: custom routing ({name}) weighs experts in a way that is not known")
    # 0.5.23 calls them otherwise.
    name = "num_shared_topk_slots" if hasattr(config, "num_shared_topk_slots") else "num_fused_shared_experts"
    return int(getattr(config, name)) if columns == config.top_k else 0


def _scores(config: Any, logits: "torch.Tensor") -> "torch.Tensor":
    """Return [T, E] float32: what the router weighs experts by, without the bias that it selects by.

    Source: sglang@0.5.20: srt/layers/moe/topk.py:fused_topk_torch_native, and biased_grouped_topk_impl, which knows
        sigmoid alone
    """
    import torch

    grouped = config.use_grouped_topk and config.correction_bias is not None
    function = "sigmoid" if grouped else config.scoring_func
    if function == "softmax":
        return logits.softmax(dim=1)
    if function == "sigmoid":
        return logits.sigmoid()
    if function == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits).sqrt()
    raise CaptureError(f"perturbation: scoring {function!r} is not known")


def _weights(
    config: Any,
    scores: "torch.Tensor",
    ids: "torch.Tensor",
    own_ids: "torch.Tensor",
    own_weights: "torch.Tensor",
    routed: int,
) -> "torch.Tensor":
    """Return [T, K] float32: weights of the new ids, scaled as the kernel scaled those of its own.

    Renormalised weights sum up to what the own ones do; others are as many times their scores as the own ones are. A
    shared expert's weight is a share of all routed ones', before they are renormalised.
    """
    import torch

    weights = scores.gather(1, ids)
    own = own_weights.float()
    total = own[:, :routed].sum(dim=1, keepdim=True)
    if config.renormalize:
        weights = weights * (total / weights.sum(dim=1, keepdim=True))
    elif config.apply_routed_scaling_factor_on_output:
        # A padded row may have no experts, which the kernel calls -1.
        own_scores = scores.gather(1, own_ids.long().clamp(0, scores.shape[1] - 1))
        weights = weights * (total / own_scores.sum(dim=1, keepdim=True))
    shared = own[:, routed:] * (weights.sum(dim=1, keepdim=True) / total)
    return torch.cat([weights, shared], dim=1)
