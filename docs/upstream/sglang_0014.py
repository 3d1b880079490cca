"""Of models that give their top-k no layer_id, one layer's experts are in all layers, or the scheduler ends."""

import subprocess
import sys
import tempfile

from sglang_engine import SHAPE, rows_of, start_engine
from transformers import OlmoeConfig, OlmoeForCausalLM

if __name__ == "__main__":
    if sys.argv[1:] == ["engine"]:
        sizes = {"num_hidden_layers": SHAPE.num_layers, "num_experts_per_tok": SHAPE.topk, "num_attention_heads": 4}
        config = OlmoeConfig(vocab_size=512, hidden_size=64, intermediate_size=32, num_experts=32, **sizes)
        OlmoeForCausalLM(config).save_pretrained(folder := tempfile.mkdtemp())
        with start_engine(folder) as engine:
            rows = rows_of(engine.replies([[3]], {"max_new_tokens": 8, "ignore_eos": True})[0])
            same = (rows == rows[:, :1]).all()
            print(f"a prompt of one token: all {SHAPE.num_layers} layers have the same experts: {same}", flush=True)
            print(rows_of(engine.replies([[3, 5, 7, 11]], {"max_new_tokens": 8})[0]))
    else:
        done = subprocess.run([sys.executable, __file__, "engine"], capture_output=True, text=True, check=False)
        said = [line for line in done.stderr.splitlines() if "Error" in line]
        print(f"{done.stdout}a prompt of 4 tokens: exit code {done.returncode}; {said[-1] if said else ''}")
