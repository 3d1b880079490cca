"""Score tokens in the distribution that they were sampled from: logits over the rollout's temperature.

s: sequence length of the rank's share; b: samples; v: vocabulary of the tensor-parallel rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from r3_adapter.errors import ReplayError
from r3_adapter.megatron.batches import MicroBatch
from r3_adapter.megatron.layers import unwrapped


@contextmanager
def scored_at(chunk: torch.nn.Module, batch: MicroBatch) -> Iterator[None]:
    """Let a model chunk that is called inside with the batch's labels score them at the batch's temperatures.

    Old log-probabilities, those of a reference and those that are trained on all come from Megatron's cross entropy;
    its logits [s, b, v] are divided, in float32, just before it. Tensor-parallel and fused forms of it are the same
    then, and what is recomputed lies before it. Other heads, of multi-token prediction, call it with other labels and
    keep their own logits. Where all temperatures are 1, nothing is changed.

    Raises:
        ReplayError: The chunk has the loss, and did not compute it once by its cross entropy for these labels.

    Source: megatron-core@0.16.1, 0.19.2: core/models/common/language_module/language_module.py
    """
    model, temperatures = unwrapped(chunk), batch.temperatures
    if temperatures is None or not model.post_process:
        yield
        return
    cross_entropy, scored = model.compute_language_model_loss, 0

    def tempered(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        nonlocal scored
        if labels is batch.labels:
            scored += 1
            logits = logits / temperatures.transpose(0, 1).unsqueeze(-1)
        found: torch.Tensor = cross_entropy(labels, logits)
        return found

    model.compute_language_model_loss = tempered
    try:
        yield
    finally:
        del model.compute_language_model_loss
    if scored != 1:
        raise ReplayError(f"the model scored the batch's labels {scored} times != 1 at the rollout's temperature")
