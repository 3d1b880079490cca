"""A rollout in SGLang, scored in Megatron-core on the same tokens: once routing live, once with the routes replayed."""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from r3_adapter.arguments import add_seed_argument, add_size
from r3_adapter.errors import R3Error
from r3_adapter.flag_values import make_folder, whole
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.parsers import OneCommandParser
from r3_adapter.processes import guarded
from r3_adapter.proof.prove import check_fits
from r3_adapter.proof.scoring import score
from r3_adapter.proof.tiny import ENGINE, TinyModel, write_checkpoint
from r3_adapter.report import Comparison, ProgressCallback, comparison_table, plot_comparison, progress_bars
from r3_adapter.rollout import Sample
from r3_adapter.sglang.engine import native_bytes, rollout_in_subprocess
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.signals import run_command

PROMPT_TOKENS, RESPONSE_TOKENS, MICRO_BATCH = 16, 128, 4


def main() -> None:
    """Run it and write report.json and report.png."""
    examples = ("./launch/quickstart.sh", "./launch/quickstart.sh --ep 4 --dtype float32")
    parser = OneCommandParser(prog="quickstart", description=__doc__, examples=examples)
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder of the results")
    parser.add_argument("--samples", type=whole(1), default=32, help=f"responses of {RESPONSE_TOKENS} tokens each")
    add_size(parser, "ep", default=2)
    text = "dtype of rollout and trainer"
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help=text)
    add_seed_argument(parser, "seed of weights, prompts and sampling")
    args = parser.parse_args()
    layout = ParallelLayout.smallest(ep=args.expert_model_parallel_size)
    check_fits(layout)
    if args.samples % (MICRO_BATCH * layout.dp):
        raise R3Error(f"--samples ({args.samples}) is no multiple of micro-batch ({MICRO_BATCH}) x dp ({layout.dp})")
    make_folder(args.out)
    waits = {"rollout": "the engine starts", "trainer": "after the rollout"}
    with tempfile.TemporaryDirectory() as name, progress_bars(waits) as progress:
        checkpoint = Path(name)
        write_checkpoint(checkpoint, dtype=args.dtype, seed=args.seed)
        moe = MoEConfig.from_checkpoint(checkpoint)
        samples = roll_out(checkpoint, args.dtype, args.samples, args.seed, progress[0])
        scores = score(checkpoint, samples, layout, TrainerOptions(micro_batch_size=MICRO_BATCH), progress=progress[1])
    rollout = np.concatenate([sample.logprobs for sample in samples])
    trainer = {mode: np.concatenate(found.logprobs) for mode, found in scores.items()}
    sides = {
        mode: Comparison.of(trainer[mode], rollout, found.agreement, found.routes_equal if mode == "replay" else 0)
        for mode, found in scores.items()
    }
    payload = payload_sizes(samples, moe)
    report = {
        "model": f"Qwen3-MoE, {moe.num_layers} layers, {moe.num_experts} experts, top-{moe.topk}, {args.dtype}",
        "layout": {"ep": args.expert_model_parallel_size, "world_size": layout.world_size},
        **{mode: side.to_json() for mode, side in sides.items()},
        "ratio_k3": sides["replay"].gap.k3 / sides["live"].gap.k3,
        "payload_bytes_per_token": payload,
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot_comparison(args.out / "report.png", rollout, trainer, sides)
    console = Console()
    console.print(comparison_table(sides["live"], sides["replay"], payload))
    console.print(f"k3 KL with routes replayed / live: {report['ratio_k3']:.3f}")
    console.print(f"written: {args.out}/report.json, {args.out}/report.png")


def roll_out(checkpoint: Path, dtype: str, num_samples: int, seed: int, progress: ProgressCallback) -> list[Sample]:
    """Generate from random prompts, each from its own tokens so that no two share a prefix."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(3, TinyModel().vocab_size, (num_samples, PROMPT_TOKENS)).tolist()
    settings = EngineSettings(model_path=str(checkpoint), dtype=dtype, random_seed=seed, **ENGINE)
    params = {"temperature": 1.0, "max_new_tokens": RESPONSE_TOKENS, "ignore_eos": True}
    return rollout_in_subprocess(settings, prompts, params, batch_size=16, progress=progress)


def payload_sizes(samples: Sequence[Sample], moe: MoEConfig) -> dict[str, float]:
    """Return the bytes that routes take for each token of prompt and response, as they leave the engine."""
    tokens = sum(sample.trace.num_tokens for sample in samples)
    native = sum(native_bytes(sample.trace.num_tokens, moe) for sample in samples)
    return {
        "payload a token": sum(sample.payload_bytes for sample in samples) / tokens,
        "SGLang's native payload a token": native / tokens,
    }


if __name__ == "__main__":
    sys.exit(run_command("quickstart", guarded()(main)))
