"""How fast a step was: tokens a second, those of a GPU, and the share of the GPUs' arithmetic that the model needs."""

from collections.abc import Mapping
from typing import Any

from r3_adapter.plan.model import ModelShape

PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "H20": 148e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "MI300X": 1307e12,
}
"""Dense bfloat16, as the makers' data sheets have it, by a word of the GPU's name."""


def flops_per_token(model: ModelShape) -> float:
    """Return the arithmetic of a token's forward and backward pass: 6 for each parameter that the token meets.

    Attention's own products are left out, so the share of long sequences is a little low; so is recomputation.
    """
    layers = sum(layer.split + layer.whole for layer in model.layers)
    experts = sum(layer.experts for layer in model.layers) * model.moe.topk / model.moe.num_experts
    return 6 * (layers + experts + model.output)


def peak_flops(gpu: str) -> float | None:
    """Return the peak of a GPU by its name; None of one that is not known."""
    words = gpu.upper().replace("-", " ").split()
    return next((peak for name, peak in PEAK_FLOPS.items() if name in words), None)


def throughput(
    seconds: Mapping[str, float],
    *,
    response_tokens: int,
    trained_tokens: int,
    num_ranks: int,
    num_engine_gpus: float,
    gpu: str,
    flops: float,
) -> dict[str, Any]:
    """Return metrics of a step; those of GPUs only where there are some, and `mfu` where their peak is known.

    trained_tokens: of all samples, prompts included. gpu: the name of the ranks' GPU, "" on a CPU.
    flops: of a token, as flops_per_token has it.
    """
    found = {"tokens_per_sec": response_tokens / seconds["step"]}
    if rollout := seconds.get("rollout"):
        found["rollout_tokens_per_sec"] = response_tokens / rollout
        if num_engine_gpus:
            found["tokens_per_gpu_per_sec"] = response_tokens / rollout / num_engine_gpus
    if train := seconds.get("train"):
        found["actor_train_tok_per_s"] = trained_tokens / train
        if gpu:
            found["actor_train_tflops"] = flops * trained_tokens / train / num_ranks / 1e12
            if peak := peak_flops(gpu):
                found["mfu"] = found["actor_train_tflops"] * 1e12 / peak
    return found
