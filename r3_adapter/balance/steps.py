"""The steps that `r3 balance` looks at: recorded ones, as tokens and counts of their samples.

S: samples; L: MoE layers; E: experts of a layer.
"""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from r3_adapter.balance.loads import Counts, Placed, count_traces
from r3_adapter.balance.table import Table
from r3_adapter.errors import LayoutError
from r3_adapter.rollout import SampleFolder

Step = tuple[npt.NDArray[np.int64], Counts]
"""The tokens [S] of the samples of a step, and their counts [S, L, E]."""
_STEP = re.compile(r"(\d{6})-\d{5}")


def table_of(expert_at: Placed, folders: Sequence[SampleFolder]) -> Table:
    """Return a placement [L, E] as the table of the model that recorded rollouts are of; without any, of no model."""
    if not folders:
        return Table(expert_at, np.arange(len(expert_at), dtype=np.int32))
    trace = folders[0][0].trace
    return Table(expert_at, trace.layer_ids, trace.model)


def steps_of(folders: Sequence[SampleFolder]) -> list[Step]:
    """Read recorded rollouts; folders that a run has named by their step are taken together, others are one step.

    Raises:
        R3Error: samples that cannot be read, or of another model than the first.
    """
    found: dict[str, list[SampleFolder]] = {}
    for folder in folders:
        name = _STEP.fullmatch(folder.folder.name)
        found.setdefault(name[1] if name else "", []).append(folder)
    steps = []
    for _, own in sorted(found.items()):
        traces = [sample.trace for folder in own for sample in folder[:]]
        tokens = np.array([trace.num_tokens for trace in traces], np.int64)
        steps.append((tokens, count_traces(traces)))
    for number, (_, counts) in enumerate(steps):
        if counts.shape[1:] != steps[0][1].shape[1:]:
            raise LayoutError(
                f"step {number}: (layers, experts) {counts.shape[1:]} != {steps[0][1].shape[1:]} of step 0"
            )
    return steps
