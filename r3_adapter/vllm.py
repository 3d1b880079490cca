"""Read the routes that vLLM returns: base64 of numpy's own format, which does not say what it belongs to.

S: tokens of the sample (prompt and output); L: decoder layers; M: MoE layers; K: experts a token.
"""

from collections.abc import Sequence
from io import BytesIO

import numpy as np

from r3_adapter.errors import CaptureError
from r3_adapter.sglang.capture import NPY, trace_of_rows
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.reply import from_base64
from r3_adapter.trace import RoutingTrace

_DTYPES = ("uint8", "uint16", "int16", "int32", "int64")
_MAX_HEADER = 1 << 12


def trace_from_npy(
    payload: bytes | memoryview | str,
    *,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    moe: MoEConfig,
    weight_version: str = "default",
    place: str = "payload",
) -> RoutingTrace:
    """Read `routed_experts` of a choice: [S - 1, L, K], or [S, L, K], whose last row nothing was computed for.

    payload: the base64, or its bytes. Routes of the MoE layers alone, [.., M, K], are taken as well.
    token_ids: prompt and output.

    Raises:
        CaptureError: It is no such array, its shape does not fit the tokens or the model, or an id is out of range.
        TraceError: A row repeats an expert.

    Source: vllm: entrypoints/openai, `routed_experts` of a choice
    """
    routes = _read(bytes(from_base64(payload, place)), place)
    tokens, num_layers = len(token_ids), moe.num_layers
    shapes = [(rows, layers, moe.topk) for rows in (tokens - 1, tokens) for layers in (num_layers, len(moe.layer_ids))]
    if routes.shape not in shapes:
        raise CaptureError(
            f"{place}: routes of shape {list(routes.shape)} != {list(shapes[0])} (tokens - 1, decoder layers, topk)"
        )
    routes = routes[: tokens - 1]
    if routes.shape[1] != num_layers:
        everywhere = np.zeros((tokens - 1, num_layers, moe.topk), routes.dtype)
        everywhere[:, list(moe.layer_ids)] = routes
        routes = everywhere
    return trace_of_rows(
        routes,
        token_ids=token_ids,
        num_prompt_tokens=num_prompt_tokens,
        moe=moe,
        weight_versions=weight_version,
        place=place,
    )


def _read(data: bytes, place: str) -> np.ndarray[tuple[int, ...], np.dtype[np.integer]]:
    """Return the array of bytes in numpy's format; nothing in it is executed, and it is no larger than its bytes."""
    if data[:6] != NPY:
        raise CaptureError(f"{place}: payload of {len(data)} bytes is not numpy's .npy")
    stream = BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=_MAX_HEADER)
    except Exception as error:
        # numpy reads the header as Python's tokens and literals, which fail in many ways.
        raise CaptureError(f"{place}: .npy without a header that can be read: {error}") from error
    if dtype.name not in _DTYPES or not dtype.isnative or fortran or len(shape) != 3:
        raise CaptureError(f"{place}: .npy of {dtype}, shape {list(shape)}, fortran order {fortran}: no routes")
    start, want = stream.tell(), dtype.itemsize * int(np.prod(shape, dtype=object))
    if len(data) - start != want or min(shape) < 0:
        raise CaptureError(f"{place}: .npy has {len(data) - start} bytes != {want} of {dtype} {list(shape)}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)
