"""What becomes of a reply's experts on their way over HTTP to a client on the same host, step by step."""

import base64
import json
from time import process_time

import numpy as np
import orjson
import pybase64

rows = np.random.default_rng(0).integers(0, 128, (32768, 48, 8), dtype=np.int32)  # 32768 tokens of Qwen3-30B-A3B
steps = {
    "bytes in the detokenizer": lambda data: data.tobytes(),
    "their base64": lambda data: pybase64.b64encode(data).decode(),
    "the server's JSON": lambda data: orjson.dumps({"meta_info": {"routed_experts": data}}),
    "text that the client parsed": lambda data: json.loads(data)["meta_info"]["routed_experts"],
    "bytes in the client": base64.b64decode,
}
data = rows
for name, step in steps.items():
    begin, data = process_time(), step(data)
    print(f"{name}: {len(data) / 1e6:.1f} MB, {process_time() - begin:.2f} s of a core")
print(f"ids of 128 experts need a byte each: {rows.size / 1e6:.1f} MB")
