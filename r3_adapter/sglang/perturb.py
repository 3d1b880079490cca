"""Make the rollout select other experts than its router would: the proof that replay works needs routes far from live.

T: tokens; E: experts; K: experts a token.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r3_adapter.errors import CaptureError

if TYPE_CHECKING:
    import torch

VARIABLE = "R3_PERTURB"


@dataclass(frozen=True)
class Perturbation:
    """Which share of (token, layer) rows gets K random experts instead of its own, and the seed of the choice."""

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

    def install(self) -> None:
        """Wrap what every selection goes through just before it is captured, whichever kernel selected.

        Random numbers are drawn in the order of the calls. CUDA graphs would replay one draw: run without them.

        Source: sglang@0.5.20: srt/layers/moe/topk.py:_post_process_topk_ids
        """
        import torch
        from sglang.srt.layers.moe import topk

        inner, generators = topk._post_process_topk_ids, dict[torch.device, torch.Generator]()

        def post_process(topk_ids: Any, topk_weights: Any, topk_config: Any, router_logits: Any, **others: Any) -> Any:
            device = router_logits.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(self.seed)
            ids, weights = self.perturb(topk_ids, topk_weights, topk_config, router_logits, generators[device])
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
        generator: "torch.Generator",
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return ids and weights with a random share of the rows replaced; the other rows keep their bits.

        topk_ids: [T, K] integers; topk_weights: [T, K] float; router_logits: [T, E] float.
        config: SGLang's TopKConfig; the weights of a replaced row are its own scores at the new ids.

        Raises:
            CaptureError: The router weighs experts in a way that is not known here.

        Source: sglang@0.5.20: srt/layers/moe/topk.py:fused_topk_torch_native
        """
        import torch

        # 0.5.23 calls the columns of shared experts otherwise.
        name = "num_shared_topk_slots" if hasattr(config, "num_shared_topk_slots") else "num_fused_shared_experts"
        if config.custom_routing_function is not None or getattr(config, name):
            raise CaptureError("perturbation: custom routing or fused shared experts are not supported")
        if config.apply_routed_scaling_factor_on_output or config.scoring_func not in ("softmax", "sigmoid"):
            raise CaptureError(f"perturbation: scoring {config.scoring_func!r}, or scaled weights, not supported")
        num_tokens, device = router_logits.shape[0], router_logits.device
        noise = torch.rand(router_logits.shape, generator=generator, device=device)
        ids = noise.topk(topk_ids.shape[1], dim=1).indices
        logits = router_logits.float()
        scores = logits.softmax(dim=1) if config.scoring_func == "softmax" else logits.sigmoid()
        weights = scores.gather(1, ids)
        if config.renormalize:
            weights = weights / weights.sum(dim=1, keepdim=True)
        replaced = torch.rand((num_tokens, 1), generator=generator, device=device) < self.fraction
        new_ids = torch.where(replaced, ids.to(topk_ids.dtype), topk_ids)
        return new_ids, torch.where(replaced, weights.to(topk_weights.dtype), topk_weights)
