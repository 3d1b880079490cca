"""What verl's metrics say of replay: rows by kind, experts that live routers would have used too, and k3.

b: samples; R: response tokens of one.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from r3_adapter.frameworks.metrics import Counts, compare_live
from r3_adapter.megatron.replay_batch import ReplayBatch
from r3_adapter.metrics import gap

_GAP = ("k3", "mean_abs", "max_abs", "f_2")


class Report:
    """An engine's metrics; verl drops those of a pass for log-probabilities, so they go with the next update's."""

    def __init__(self) -> None:
        self._counts = Counts()
        self._held: dict[str, float] = {}

    @contextmanager
    def watched(
        self, chunks: Sequence[torch.nn.Module], steps: Sequence[Sequence[ReplayBatch]], forward_only: bool
    ) -> Iterator[None]:
        """Count the rows of a pass; every rank must enter it. Live experts are compared in passes before an update."""
        from megatron.core import parallel_state as ps

        counts = Counts()
        # All pipeline stages have the same rows.
        if ps.is_pipeline_first_stage(ignore_virtual=True):
            counts.add_rows(steps[0])
        compared = forward_only or not self._held
        with compare_live(chunks, steps, counts) if compared else nullcontext():
            yield
        self._counts = counts.summed()

    def add(self, output: Any, data: Any, forward_only: bool) -> None:
        """Put a pass's metrics into the metrics of its output, if it trains; each value is a list, as verl's are.

        output, data: of verl's forward_backward_batch; output is empty on all but the last pipeline stage.
        """
        metrics = self._counts.report() | _gap(output, data)
        if forward_only:
            self._held = {name.replace("r3/", "r3/old/"): value for name, value in metrics.items()}
        elif output:
            output["metrics"] |= {name: [value] for name, value in (self._held | metrics).items()}


def _gap(output: Any, data: Any) -> dict[str, float]:
    """Return how far this pass's log-probabilities are from the rollout's; nothing where one of them is not known."""
    from verl.workers.utils.padding import no_padding_2_padding

    own, theirs = (output or {}).get("model_output", {}).get("log_probs"), data.get("rollout_log_probs", None)
    if own is None or theirs is None:
        return {}
    # [b, R], which a batch may have longer than any of its samples.
    own, theirs, mask = no_padding_2_padding(own, data), _padded(theirs), _padded(data["response_mask"]).bool()
    width = min(own.shape[1], theirs.shape[1], mask.shape[1])
    own, theirs, mask = (each.detach().cpu()[:, :width] for each in (own, theirs, mask))
    both = _selected(own, mask), _selected(theirs, mask)
    if not both[0].size:
        return {}
    if not all(np.isfinite(each).all() for each in both):
        # An error of one pipeline stage alone would leave the others in a collective.
        return {"r3/k3": math.nan}
    found = asdict(gap(*both))
    return {f"r3/{name}": found[name] for name in _GAP}


def _padded(values: torch.Tensor) -> torch.Tensor:
    return values.to_padded_tensor(0) if values.is_nested else values


def _selected(values: torch.Tensor, mask: torch.Tensor) -> npt.NDArray[np.floating[Any]]:
    found: npt.NDArray[np.floating[Any]] = values[mask].float().numpy()
    return found
