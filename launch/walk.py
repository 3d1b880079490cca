"""Write a checkpoint with random weights of a real model's widths and few layers; launch/walk.sh starts it."""

import argparse
import json
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

ON_CPU = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 512,
}
"""Widths for a machine without a GPU."""


def main() -> None:
    """Write config.json and the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="config.json of a Qwen3-MoE")
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--layers", type=int, default=4, help="default: 4")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = json.loads(args.config.read_text(encoding="utf-8")) | {"num_hidden_layers": args.layers}
    config = Qwen3MoeConfig(
        **{**found, **(ON_CPU if device == "cpu" else {})},
        norm_topk_prob=True,
        bos_token_id=1,
        eos_token_id=2,
        # Wider than a trained model begins, so that routers have something to choose by.
        initializer_range=0.06,
    )
    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
