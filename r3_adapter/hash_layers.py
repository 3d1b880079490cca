"""MoE layers whose experts follow from the token id alone, by a table in the checkpoint, as DeepSeek-V4's first ones.

An engine captures no routes of them, since there is nothing to choose; they are filled in here from table and tokens.
Routers of such layers still weigh their experts by their own scores, so replay works for them as elsewhere.

S: tokens; M: MoE layers; K: experts a token; V: token ids of the vocabulary.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from r3_adapter.errors import TraceError
from r3_adapter.trace import RoutingTrace

TABLE = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?tid2eid$")
"""How a table is called in a checkpoint. Source: sglang@0.5.20: srt/layers/moe/hash_topk.py:HashTopK.tid2eid;
transformers@5.12.1: models/deepseek_v4/modeling_deepseek_v4.py:DeepseekV4HashRouter.tid2eid"""


@dataclass(frozen=True)
class HashTables:
    """The tables of a checkpoint.

    tables: by layer id (from 0), [V, K] integers: the experts of each token id.
    place: names the checkpoint in errors.
    """

    tables: Mapping[int, npt.NDArray[np.integer]]
    place: str = "checkpoint"

    @classmethod
    def from_checkpoint(cls, folder: Path) -> "HashTables":
        """Read the tables of a folder's safetensors files; none, if the model has no such layers.

        Raises:
            TraceError: A file cannot be read, or two tables of one layer.
        """
        tables: dict[int, npt.NDArray[np.integer]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="numpy") as file:
                    for name in file.keys():  # noqa: SIM118
                        if (match := TABLE.search(name)) is None:
                            continue
                        if (layer := int(match[1])) in tables:
                            raise TraceError(f"{path}: {name}: a second table of experts of layer {layer}")
                        tables[layer] = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise TraceError(f"{path}: cannot be read: {error}") from error
        return cls(tables, str(folder))

    def fill(self, trace: RoutingTrace) -> RoutingTrace:
        """Return the trace with the layers of the tables; rows that were not captured stay so in all layers.

        Layers that the trace has already are compared with their table.

        Raises:
            TraceError: A table of another top-k, a token id beyond it, ids that no row can have; or a row of the trace
                that is not its token's.
        """
        layers = dict(zip(trace.layer_ids.tolist(), range(len(trace.layer_ids)), strict=True))
        found = {layer: trace.topk_ids[:, at] for layer, at in layers.items()}
        for layer, table in self.tables.items():
            rows = self._rows(layer, table, trace)
            if layer in found:
                _check_same(found[layer], rows, trace, f"{self.place}: layer {layer}")
            else:
                found[layer] = rows
        layer_ids = sorted(found)
        try:
            return replace(
                trace,
                topk_ids=np.stack([found[layer] for layer in layer_ids], axis=1),
                layer_ids=np.array(layer_ids, np.int32),
            )
        except TraceError as error:
            raise TraceError(f"{self.place}: experts of token ids: {error}") from error

    def _rows(self, layer: int, table: npt.NDArray[np.integer], trace: RoutingTrace) -> npt.NDArray[np.integer]:
        """Return [S, K] of the trace's dtype: the experts of its tokens, 0 in rows that were not captured."""
        where = f"{self.place}: layer {layer}: table of experts"
        if table.ndim != 2 or table.dtype.kind not in "iu" or table.shape[1] != trace.topk:
            raise TraceError(f"{where}: {table.dtype} {list(table.shape)} != integers [vocabulary, {trace.topk}]")
        tokens = trace.token_ids[trace.captured]
        if len(tokens) and (largest := int(tokens.max())) >= len(table):
            raise TraceError(f"{where}: token id {largest} outside 0 to {len(table) - 1}")
        experts = table[tokens]
        bad = np.argwhere((experts < 0) | (experts >= trace.num_experts))
        if len(bad):
            at, column = bad[0]
            raise TraceError(
                f"{where}: expert {experts[at, column]} of token id {tokens[at]} outside 0 to {trace.num_experts - 1}"
            )
        rows = np.zeros((trace.num_tokens, trace.topk), trace.topk_ids.dtype)
        rows[trace.captured] = experts
        return rows


def _check_same(have: npt.NDArray[np.integer], want: npt.NDArray[np.integer], trace: RoutingTrace, where: str) -> None:
    other = np.flatnonzero((np.sort(have, axis=1) != np.sort(want, axis=1)).any(axis=1))
    if len(other):
        at = int(other[0])
        raise TraceError(
            f"{where}: experts {have[at].tolist()} at token {at} != {want[at].tolist()} of token id "
            f"{trace.token_ids[at]} in the table"
        )
