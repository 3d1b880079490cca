"""One rank of verl's own Megatron engine, with its own batches, packing, passes and loss; started by test_verl.py.

python verl_rank.py CHECKPOINT SAMPLES RENDEZVOUS RANK

b: samples of this rank; S: tokens of one; R: its response tokens.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from r3_adapter.megatron import cpu

cpu.install()

from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.megatron_utils import register_megatron_training_hooks  # noqa: E402
from verl.workers.config import ActorConfig, McoreEngineConfig  # noqa: E402
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead  # noqa: E402
from verl.workers.engine_workers import ActorRolloutRefWorker  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402
from verl.workers.utils.padding import no_padding_2_padding  # noqa: E402

from r3_adapter.errors import ReplayError  # noqa: E402
from r3_adapter.frameworks.verl.sealed import seal  # noqa: E402
from r3_adapter.layout import ParallelLayout  # noqa: E402
from r3_adapter.megatron.policy_trainer.build import build_model, build_optimizer, initialize  # noqa: E402
from r3_adapter.megatron.policy_trainer.options import TrainerOptions  # noqa: E402
from r3_adapter.rollout import Sample, load_samples  # noqa: E402
from r3_adapter.sglang.moe_config import MoEConfig  # noqa: E402

STEP = 70_001
LAYOUTS = ({"ep": 2}, {"tp": 2, "ep": 2, "etp": 1}, {"cp": 2, "ep": 2}, {"pp": 2})


class Engine(MegatronEngineWithLMHead):
    """verl's engine with a model in float32 that no bridge has made."""

    def __init__(self, checkpoint: Path, layout: ParallelLayout) -> None:
        from transformers import AutoConfig

        model = SimpleNamespace(
            hf_config=AutoConfig.from_pretrained(checkpoint),
            model_type="language_model",
            mtp=SimpleNamespace(enable=False),
            tokenizer=SimpleNamespace(pad_token_id=0),
        )
        config = McoreEngineConfig(
            tensor_model_parallel_size=layout.tp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
        )
        super().__init__(model, config, None, None)
        options = TrainerOptions(qkv_format="thd")
        self.module, self.optimizer = build_optimizer(build_model(checkpoint, layout, options), distributed=False)
        self.tf_config = self.module[0].config
        self.is_value_model, self.lr_scheduler = False, None
        register_megatron_training_hooks(self.module, self.optimizer)

    def _routed_num_tokens(self, data: Any) -> torch.Tensor:
        # verl sums it over ranks in place, in a copy on the device; on a CPU that would be the batch's own offsets.
        return super()._routed_num_tokens(data).clone()


def worker(engine: Engine, *, replay: bool, verl_replays: bool = False) -> Any:
    """Return what verl's worker has of itself in a pass of the actor."""

    def train(data: Any) -> Any:
        with engine.train_mode(disable_auto_offload=True):
            return engine.train_batch(
                data, partial(ppo_loss, ActorConfig(strategy="megatron", rollout_n=1, use_dynamic_bsz=True))
            )

    def infer(data: Any) -> Any:
        with engine.eval_mode(disable_auto_offload=True):
            return engine.infer_batch(data)

    return SimpleNamespace(
        config=SimpleNamespace(
            rollout=SimpleNamespace(enable_rollout_routing_replay=replay), actor=SimpleNamespace(strategy="megatron")
        ),
        enable_routing_replay=verl_replays,
        actor=SimpleNamespace(
            infer_batch=lambda data: _Output(infer(data)), train_mini_batch=lambda data: _Output(train(data))
        ),
    )


class _Output(dict):  # type: ignore[type-arg]
    def cpu(self) -> "_Output":
        return self


def rows(sample: Sample, moe: MoEConfig) -> np.ndarray[Any, Any]:
    """Return a sample's rows as the plug-in makes them of the engine's reply."""
    trace = sample.trace
    flat = np.zeros((trace.num_tokens - 1, moe.num_layers, moe.topk), np.int32)
    flat[:, list(moe.layer_ids)] = trace.topk_ids[:-1]
    return seal(flat, trace.token_ids[:-1].tolist(), STEP, moe, "sample")


def batch(samples: list[Sample], moe: MoEConfig, routes: list[Any] | None = None) -> Any:
    """Return a batch as verl's agent loop makes one, without padding."""
    made = []
    for index, sample in enumerate(samples):
        tokens, prompt = sample.trace.token_ids.tolist(), sample.num_prompt_tokens
        made.append(
            AgentLoopOutput(
                prompt_ids=tokens[:prompt],
                response_ids=tokens[prompt:],
                response_mask=[1] * (len(tokens) - prompt),
                response_logprobs=sample.logprobs.tolist(),
                routed_experts=rows(sample, moe) if routes is None else routes[index],
                metrics=AgentLoopMetrics(),
            ).as_dict()
        )
    nested = {
        name: torch.nested.as_nested_tensor([each[name] for each in made], layout=torch.jagged)
        for name in ("prompts", "responses", "response_mask", "rollout_log_probs", "routed_experts")
    }
    tokens = [torch.cat([each["prompts"], each["responses"]]) for each in made]
    nested["input_ids"] = torch.nested.as_nested_tensor(tokens, layout=torch.jagged)
    nested["position_ids"] = torch.nested.as_nested_tensor([torch.arange(len(x)) for x in tokens], layout=torch.jagged)
    nested["loss_mask"] = nested["response_mask"]
    nested["old_log_probs"] = nested["rollout_log_probs"]
    nested["advantages"] = torch.nested.as_nested_tensor(
        [torch.linspace(-1, 1, len(x["responses"])) for x in made], layout=torch.jagged
    )
    temperature = torch.tensor([sample.temperature for sample in samples])
    settings = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 300, "global_batch_size": 2 * len(samples)}
    return tu.get_tensordict({**nested, "temperature": temperature}, settings)


def worst(output: Any, data: Any, samples: list[Sample]) -> float:
    """Return the largest difference of log-probabilities to the rollout's; 0 where another rank has them."""
    if not output:
        return 0.0
    found = no_padding_2_padding(output["model_output"]["log_probs"], data)
    return max(
        float((own[: len(each.logprobs)] - torch.from_numpy(each.logprobs.copy())).abs().max())
        for own, each in zip(found, samples, strict=True)
    )


def regroup(layout: ParallelLayout) -> None:
    """Give the process group another layout."""
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    ps.destroy_model_parallel()
    ps.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    model_parallel_cuda_manual_seed(1234)


def largest(mine: float) -> float:
    """Return the largest number of all ranks."""
    found = torch.tensor(mine)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return float(found)


def check_passes(engine: Engine, samples: list[Sample], every: list[Sample], moe: MoEConfig) -> None:
    """Score live, score replayed, and train: the pass that trains comes last, as it changes the weights."""
    data = batch(samples, moe)
    output = ActorRolloutRefWorker.compute_log_prob(worker(engine, replay=False), data)
    live = largest(worst(output, data, samples))
    assert live > 1e-2, f"live routers are off by {live} only: nothing was proved"
    data = batch(samples, moe)
    output = ActorRolloutRefWorker.compute_log_prob(worker(engine, replay=True), data)
    replayed = largest(worst(output, data, samples))
    assert replayed < 1e-4, f"replay is off by {replayed}"
    data = batch(samples, moe)
    output = ActorRolloutRefWorker.update_actor(worker(engine, replay=True), data)
    updated = largest(worst(output, data, samples))
    assert updated < 1e-4, f"replay in training is off by {updated}"
    if engine.is_mp_src_rank_with_outputs():
        check_metrics({name: value[0] for name, value in output["metrics"].items() if name.startswith("r3/")}, every)


def check_metrics(metrics: dict[str, float], every: list[Sample]) -> None:
    captured = sum(int(sample.trace.captured.sum()) for sample in every)
    for prefix in ("r3/", "r3/old/"):
        assert metrics[f"{prefix}replayed"] == captured, (metrics, captured)
        assert metrics[f"{prefix}live"] == metrics[f"{prefix}stale"] == 0, metrics
        # The last token of each sample, at least.
        assert metrics[f"{prefix}padding"] >= len(every), metrics
        assert 0 <= metrics[f"{prefix}k3"] < 1e-8 and metrics[f"{prefix}max_abs"] < 1e-4, metrics
    assert 0.5 < metrics["r3/old/agreement"] < 0.95, metrics


def check_refusals(engine: Engine, samples: list[Sample], moe: MoEConfig, rank: int) -> None:
    """What one rank refuses, all do, before a forward pass; what both did before is repeated after it."""
    routes = [rows(sample, moe) for sample in samples]
    if rank == 1:
        routes[3] = np.roll(routes[3], 1, axis=0)
    with pytest.raises(ReplayError, match=r"rank 1: .*micro-batch \d+, sample \d+: the row at position 0 is of token"):
        ActorRolloutRefWorker.compute_log_prob(worker(engine, replay=True), batch(samples, moe, routes))
    data = batch(samples, moe)
    with pytest.raises(ReplayError, match=r"rank 0: .*no routed_experts in the batch.*rank 1: "):
        ActorRolloutRefWorker.compute_log_prob(worker(engine, replay=True), data.exclude("routed_experts"))
    with pytest.raises(ReplayError, match="verl's own replay and this plug-in's exclude each other"):
        ActorRolloutRefWorker.update_actor(worker(engine, replay=True, verl_replays=True), data)


def main(argv: list[str]) -> None:
    checkpoint, rank = Path(argv[0]), int(argv[3])
    every, moe = load_samples(Path(argv[1])), MoEConfig.from_checkpoint(checkpoint)
    for index, sizes in enumerate(LAYOUTS):
        layout = ParallelLayout.smallest(**sizes)
        if index == 0:
            initialize(layout, rank, f"file://{argv[2]}")
        else:
            regroup(layout)
        samples = every[layout.coords(rank).dp_rank :: layout.dp]
        engine = Engine(checkpoint, layout)
        if index == 0:
            check_refusals(engine, samples, moe, rank)
        check_passes(engine, samples, every, moe)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
