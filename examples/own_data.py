"""A run on prompts, a tokenizer and a reward of one's own, on one CPU in a minute.

    python examples/own_data.py FOLDER

A tiny model with a tokenizer of bytes is asked sums. What is yours in a real run: the checkpoint with its tokenizer,
the file of prompts, and `reward`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r3_adapter.proof.tiny import TinyModel, write_checkpoint


def reward(prompt: str, response: str, label: str) -> float:
    """Judge an answer: half for letters that are digits, which random weights learn first, half for the sum."""
    return 0.5 * sum(map(str.isdigit, response)) / max(len(response), 1) + 0.5 * (response == label)


def write_model(folder: Path) -> None:
    """Write a checkpoint with random weights, and a tokenizer that has a token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{letter: at for at, letter in enumerate(letters, start=3)}}
    own = Tokenizer(models.BPE(vocabulary, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    shape = TinyModel(num_layers=2, num_experts=8, topk=2, vocab_size=len(vocabulary) + 1, max_length=256)
    write_checkpoint(folder, dtype="bfloat16", seed=0, shape=shape)
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>").save_pretrained(folder)


def main(folder: Path) -> int:
    """Write model and prompts, and run."""
    write_model(folder / "model")
    rows = [{"question": f"{a}+{b}=", "sum": str(a + b)} for a in range(10) for b in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    here = Path(__file__).resolve()
    command = [sys.executable, str(here.parents[1] / "launch" / "grpo.py"), "--r3", "--save", str(folder / "run")]
    command += ["--hf-checkpoint", str(folder / "model"), "--prompt-data", str(folder / "prompts.jsonl")]
    command += ["--input-key", "question", "--label-key", "sum", "--custom-rm-path", f"{here.stem}.reward"]
    command += ["--num-rollout", "4", "--eval-interval", "2", "--eval-prompts", "8", "--rollout-max-response-len", "4"]
    # Without it SGLang takes a share of the machine's memory for keys and values.
    command += ["--sglang-args", '{"max_total_tokens": 8192}']
    # Engines find the reward by its name.
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(here.parent)}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
