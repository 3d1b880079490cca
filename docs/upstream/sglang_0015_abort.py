"""An abort of a request that waits since it was retracted loses its experts, and tokens that it sampled."""

from sglang_engine import reply_retracted, start_engine

if __name__ == "__main__":
    with start_engine() as engine:
        for state, retract in (("runs", False), ("waits since it was retracted", True)):
            reply = reply_retracted(engine, [3, 5, 7, 11], retract=retract, abort=True)
            info = reply["meta_info"]
            found = f"{len(reply['output_ids'])} tokens, {len(info['output_token_logprobs'])} log-probabilities"
            print(f"aborted while it {state}: {found}, experts: {'routed_experts' in info}")
