"""Routes in vLLM's form: numpy's own, in base64."""

import base64
from io import BytesIO
from typing import Any

import numpy as np
import pytest

from r3_adapter.errors import CaptureError, R3Error
from r3_adapter.sglang.capture import trace_from_reply
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.vllm import trace_from_npy

TOKENS = [11, 12, 13, 21, 22]
MOE = MoEConfig(num_experts=8, topk=2, layer_ids=(1, 3), num_layers=4)
ROWS = np.zeros((5, 4, 2), np.uint8)
ROWS[:, [1, 3]] = [[[0, 5], [7, 2]], [[1, 2], [3, 4]], [[4, 0], [6, 5]], [[2, 3], [1, 0]], [[3, 1], [0, 1]]]


def npy(array: np.ndarray[Any, Any], **options: Any) -> str:
    stream = BytesIO()
    np.save(stream, array, **options)
    return base64.b64encode(stream.getvalue()).decode()


def read(payload: Any) -> Any:
    return trace_from_npy(payload, token_ids=TOKENS, num_prompt_tokens=3, moe=MOE, weight_version="7")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32])
@pytest.mark.parametrize("rows", [ROWS[:-1], ROWS, ROWS[:-1, [1, 3]], ROWS[:, [1, 3]]])
def test_routes_are_read(rows: np.ndarray[Any, Any], dtype: Any) -> None:
    for payload in (npy(rows.astype(dtype)), base64.b64decode(npy(rows.astype(dtype)))):
        trace = read(payload)
        assert np.array_equal(trace.topk_ids[:-1], ROWS[:-1, [1, 3]])
        assert trace.token_ids.tolist() == TOKENS
        assert trace.captured.tolist() == [True] * 4 + [False]
        assert (trace.layer_ids.tolist(), trace.num_experts, trace.weight_versions) == ([1, 3], 8, ("7",))


WRONG: list[tuple[Any, str]] = [
    (npy(ROWS[:-2]), r"shape \[3, 4, 2\] != \[4, 4, 2\] \(tokens - 1, decoder layers, topk\)"),
    (npy(ROWS[:-1, :3]), "shape"),
    (npy(ROWS[:-1, :, :1]), "shape"),
    (npy(ROWS[:-1].astype(np.float32)), "no routes"),
    (npy(ROWS[:-1].astype(">u2")), "no routes"),
    (npy(np.asfortranarray(ROWS[:-1])), "fortran order True"),
    (npy(ROWS[:-1] + np.uint8(8)), "outside 0 to num_experts"),
    (npy(np.array([{}], object), allow_pickle=True), "no routes"),
    (base64.b64encode(base64.b64decode(npy(ROWS))[:-1]).decode(), "bytes != "),
    (base64.b64encode(base64.b64decode(npy(ROWS))[:9]).decode(), "without a header"),
    ("AAAA", "not numpy's .npy"),
    ("?", "not base64"),
    (5, "neither bytes nor base64"),
]


@pytest.mark.parametrize(("payload", "message"), WRONG)
def test_what_is_no_such_routes_is_refused(payload: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        read(payload)


def test_any_damage_to_the_header_is_refused_or_harmless() -> None:
    data, random = base64.b64decode(npy(ROWS[:-1])), np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(data)
        damaged[random.integers(0, 128)] = random.integers(0, 256)
        try:
            read(bytes(damaged))
        except R3Error:
            continue


def test_the_form_is_named_where_another_is_read() -> None:
    info = {"finish_reason": {"type": "stop"}, "routed_experts": npy(ROWS[:-1])}
    with pytest.raises(
        CaptureError, match=r"payload is numpy's \.npy, as of vLLM; read it with r3_adapter\.vllm\.trace_"
    ):
        trace_from_reply({"output_ids": TOKENS[3:], "meta_info": info}, TOKENS[:3])
