"""SGLang's own payload is base64 of int32 ids: no token, layer or weights, four bytes an id, text inside a process."""

from sglang_engine import SHAPE, rows_of, start_engine

if __name__ == "__main__":
    with start_engine() as engine:
        (reply,) = engine.replies([[3, 5, 7, 11]], {"max_new_tokens": 4, "ignore_eos": True})
    payload, rows = reply["meta_info"]["routed_experts"], rows_of(reply)
    print(f"payload of a call inside the process: {type(payload).__name__}, {len(payload)} characters")
    print(f"rows {rows.shape}, {rows.dtype}; ids of {SHAPE.num_experts} experts need a byte each: {rows.size} bytes")
    print("nothing in it says which tokens, layers, experts or weights it is about")
