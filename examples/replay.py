"""From a rollout to agreement, on one CPU.

    python examples/replay.py

SGLang generates and records experts; Megatron-core scores the same tokens, once with its own experts and once with
those of the rollout. With a rollout in bfloat16 its own differ in some routes, and so do the log-probabilities.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.batches import micro_batches
from r3_adapter.megatron.monitor import RouterMonitor
from r3_adapter.megatron.policy_trainer.build import build_model, initialize
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.megatron.reach import routed_live
from r3_adapter.megatron.replay import prepare
from r3_adapter.metrics import gap
from r3_adapter.proof.tiny import ENGINE, write_checkpoint
from r3_adapter.sglang.engine import rollout_in_subprocess
from r3_adapter.sglang.settings import EngineSettings


def main(folder: Path) -> None:
    """Print k3, the largest difference and the share of equal experts, with live routers and with replay."""
    write_checkpoint(folder / "model", dtype="bfloat16", seed=0)  # or a checkpoint of your own
    prompts = np.random.default_rng(0).integers(3, 512, (8, 16)).tolist()
    settings = EngineSettings(model_path=str(folder / "model"), **ENGINE)
    samples = rollout_in_subprocess(settings, prompts, {"temperature": 1.0, "max_new_tokens": 64, "ignore_eos": True})

    layout = ParallelLayout()  # one rank; with more, each calls this with its own number
    device = initialize(layout, 0, f"file://{folder}/rendezvous")
    (model,) = build_model(folder / "model", layout, TrainerOptions())
    (batch,) = micro_batches(samples, layout, 0, size=len(samples), qkv_format="sbhd", device=device)
    replay = prepare(model, batch.traces, batch.tokens)  # checks routes, tokens and model against each other
    rollout = np.concatenate([sample.logprobs for sample in samples])

    def score(name: str, **routes: torch.Tensor) -> None:
        monitor = RouterMonitor()
        monitor.expect(replay)
        with torch.no_grad(), monitor.watch([model]):
            losses = model(batch.tokens, batch.positions, None, labels=batch.labels, **routes)
        found = gap(-losses[batch.loss_mask > 0].float().cpu().numpy(), rollout)
        equal = np.mean([layer.ids_equal / layer.ids for layer in monitor.layers.values()])
        print(f"{name}: k3 {found.k3:.2e}, largest difference {found.max_abs:.2e}, experts equal {equal:.2%}")

    with routed_live([model]):
        score("live")
    score("replayed", **replay.model_arguments)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
