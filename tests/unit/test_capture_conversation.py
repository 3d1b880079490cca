"""A conversation's turns are asked for from where the last one's routes ended."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from r3_adapter.errors import CaptureError
from r3_adapter.sglang.conversation import converse
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.wire import write_tensors

PROMPT, FOLLOW_UPS = [11, 12, 13], [[31, 32], [41]]
PARAMS = {"max_new_tokens": 2}


class FakeEngine:
    """Gives every token the route (its position, its position + 1) modulo 8; has `evicts` lose its rows."""

    moe = MoEConfig(num_experts=8, topk=2, layer_ids=(1,), num_layers=2)

    def __init__(self, *, evicts: bool = False) -> None:
        self.evicts, self.starts = evicts, list[int]()

    def replies(
        self, prompts: Sequence[Sequence[int]], sampling_params: Mapping[str, Any], *, start: int = 0
    ) -> list[dict[str, Any]]:
        (prompt,) = prompts
        self.starts.append(start)
        output = [50 + len(prompt), 51 + len(prompt)]
        tokens = [*prompt, *output]
        at = np.arange(start, len(tokens))
        rows = (np.stack([at, at + 1], axis=1)[:, None] % 8).astype(np.uint8)
        rows[-1] = 0
        versions = np.zeros(len(at), np.int32)
        versions[-1] = -1
        engine = f"e{len(self.starts)}" if self.evicts else "e"
        metadata = {"format": "r3.routing_trace/1", "num_experts": "8", "weight_versions": json.dumps(["v1"])}
        metadata |= {"last_row": f"{engine}:{len(tokens) - 2}"}
        if start:
            metadata |= {"start": str(start), "previous_row": f"{engine}:{start - 1}"}
        arrays = {"topk_ids": rows, "token_ids": np.array(tokens[start:], np.int32), "version_ids": versions}
        payload = write_tensors({**arrays, "layer_ids": np.array([1], np.int32)}, {**metadata, "checksum": ""})
        pairs = [[-0.5, token, None] for token in output]
        info = {"routed_experts": payload, "finish_reason": {"type": "length"}, "output_token_logprobs": pairs}
        return [{"output_ids": output, "meta_info": info}]


def test_each_turn_is_a_sample_with_all_routes_before_it() -> None:
    engine = FakeEngine()
    samples = converse(engine, PROMPT, PARAMS, FOLLOW_UPS)
    assert [sample.num_prompt_tokens for sample in samples] == [3, 7, 10]
    assert samples[-1].trace.token_ids.tolist() == [11, 12, 13, 53, 54, 31, 32, 57, 58, 41, 60, 61]
    for sample in samples:
        rows = sample.trace.topk_ids[:-1, 0, 0]
        assert rows.tolist() == [at % 8 for at in range(len(rows))]
        assert sample.trace.captured.tolist() == [True] * len(rows) + [False]
        assert sample.num_response_tokens == 2
    # The last token of a turn has no route before the next one.
    assert engine.starts == [0, 4, 8]
    assert samples[1].payload_bytes < samples[0].payload_bytes + 200


def test_a_turn_upon_lost_rows_is_refused() -> None:
    with pytest.raises(CaptureError, match="conversation, turn 1: follows row e2:3 != e1:3"):
        converse(FakeEngine(evicts=True), PROMPT, PARAMS, FOLLOW_UPS)
