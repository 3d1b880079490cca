"""What a plan is made of: the model, the trainer, the batch, the engines, and the machines they run on."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from r3_adapter.errors import R3Error
from r3_adapter.layout import Packing, ParallelLayout, local_num_tokens
from r3_adapter.plan.model import ModelShape
from r3_adapter.plan.stages import Stages, even_stages, stages_of

_COUNTS = (
    "rollout_batch_size",
    "n_samples_per_prompt",
    "mean_prompt_len",
    "mean_response_len",
    "rollout_max_prompt_len",
    "rollout_max_response_len",
    "micro_batch_size",
    "num_steps_per_rollout",
    "rollout_num_engines",
    "rollout_tp_size",
    "rollout_pp_size",
    "gpus_per_node",
    "num_nodes",
)

_ENGINE_COUNTS = (
    "tp_size",
    "pp_size",
    "dp_size",
    "ep_size",
    "max_total_tokens",
    "max_running_requests",
    "chunked_prefill_size",
    "page_size",
    "context_length",
)


@dataclass(frozen=True)
class Batch:
    """The samples of a rollout step, lengths in tokens: traffic follows from mean lengths, memory from the longest."""

    num_prompts: int
    samples_per_prompt: int
    mean_prompt: int
    mean_response: int
    max_prompt: int
    max_response: int
    micro_batch_size: int
    steps: int

    @property
    def num_samples(self) -> int:
        return self.num_prompts * self.samples_per_prompt

    @property
    def mean_length(self) -> int:
        return self.mean_prompt + self.mean_response

    @property
    def max_length(self) -> int:
        return self.max_prompt + self.max_response

    def num_micro_batches(self, layout: ParallelLayout) -> int:
        """Return the micro-batches of a data-parallel rank in one optimizer step."""
        return self.num_samples // (self.steps * self.micro_batch_size * layout.dp)

    def local_tokens(self, length: int, layout: ParallelLayout) -> int:
        """Return T, the tokens of a rank's MoE layers in a micro-batch of samples of this length, padding included."""
        multiple = length_multiple(layout)
        padded_length = -(-length // multiple) * multiple
        return local_num_tokens(Packing.packed([padded_length * i for i in range(self.micro_batch_size + 1)]), layout)


def length_multiple(layout: ParallelLayout) -> int:
    """Return what the trainer pads each sample to a multiple of: CP's two chunks a rank, each cut for SP."""
    return 2 * layout.tp * layout.cp


@dataclass(frozen=True)
class Engines:
    """The rollout engines. tp, pp: parallel sizes of each; arguments: more of sglang.Engine, by name."""

    num: int
    tp: int
    pp: int
    arguments: Mapping[str, Any]

    @property
    def dp(self) -> int:
        """Ranks with attention and a KV pool of their own."""
        return int(self.arguments.get("dp_size") or 1) if self.arguments.get("enable_dp_attention") else 1

    @property
    def ep(self) -> int:
        return int(self.arguments.get("ep_size") or 1)

    @property
    def size(self) -> int:
        """GPUs of an engine."""
        return self.tp * self.pp

    @property
    def num_gpus(self) -> int:
        return self.num * self.size

    def forward_tokens(self, *, patched: bool) -> int:
        """Return the rows of the capture's buffer on the device, for one forward pass.

        Source: sglang@0.5.20 srt/state_capturer/routed_experts.py; patched: forward_tokens.py
        """
        prefill = int(self.arguments.get("chunked_prefill_size") or 8192)
        running = int(self.arguments.get("max_running_requests") or 256)
        return prefill + running if patched else max(prefill, running)


@dataclass(frozen=True)
class Machines:
    """gpu_memory: bytes of each GPU; num_nodes: None to say how many are needed."""

    gpus_per_node: int
    gpu_memory: int
    num_nodes: int | None


@dataclass(frozen=True)
class PlanRequest:
    """All that a plan is computed from.

    distributed_optimizer, cpu_offload: where the optimizer's state is.
    reference: whether a copy of the first weights stays on the trainer's ranks.
    trainer_arguments: more fields of Megatron's TransformerConfig, by name.
    """

    model: ModelShape
    layout: ParallelLayout
    pipeline_layout: str | None
    batch: Batch
    engines: Engines
    machines: Machines
    distributed_optimizer: bool
    cpu_offload: bool
    reference: bool
    trainer_arguments: Mapping[str, Any]

    @classmethod
    def from_args(cls, args: argparse.Namespace, model: ModelShape, layout: ParallelLayout) -> "PlanRequest":
        """Read the flags of `r3 plan`.

        Raises:
            R3Error: a number that is out of its range.
        """
        for name in _COUNTS:
            if (number := getattr(args, name)) is not None and number < 1:
                raise R3Error(f"--{name.replace('_', '-')} ({number}) < 1")
        if not (math.isfinite(args.gpu_memory_gib) and args.gpu_memory_gib > 0):
            raise R3Error(f"--gpu-memory-gib ({args.gpu_memory_gib}) is not a finite number above 0")
        for name, longest in (("prompt", "rollout_max_prompt_len"), ("response", "rollout_max_response_len")):
            mean, most = getattr(args, f"mean_{name}_len"), getattr(args, longest)
            if mean is not None and mean > most:
                raise R3Error(f"--mean-{name}-len ({mean}) > --{longest.replace('_', '-')} ({most})")
        _check_engine_sizes(args.sglang_args)
        max_prompt, max_response = args.rollout_max_prompt_len, args.rollout_max_response_len
        return cls(
            model=model,
            layout=layout,
            pipeline_layout=args.pipeline_model_parallel_layout,
            batch=Batch(
                num_prompts=args.rollout_batch_size,
                samples_per_prompt=args.n_samples_per_prompt,
                mean_prompt=args.mean_prompt_len or max_prompt,
                mean_response=args.mean_response_len or max_response,
                max_prompt=max_prompt,
                max_response=max_response,
                micro_batch_size=args.micro_batch_size,
                steps=args.num_steps_per_rollout,
            ),
            engines=Engines(args.rollout_num_engines, args.rollout_tp_size, args.rollout_pp_size, args.sglang_args),
            machines=Machines(args.gpus_per_node, round(args.gpu_memory_gib * (1 << 30)), args.num_nodes),
            distributed_optimizer=args.use_distributed_optimizer,
            cpu_offload=args.optimizer_cpu_offload,
            reference=args.kl_loss_coef != 0,
            trainer_arguments=args.megatron_args,
        )

    def stages(self) -> Stages:
        """Return the decoder layers of each pipeline stage and model chunk.

        Raises:
            LayoutError: layers that cannot be shared out so.
        """
        num_layers = self.model.moe.num_layers
        if self.pipeline_layout is None:
            return even_stages(num_layers, self.layout)
        return stages_of(self.pipeline_layout, num_layers, self.layout)


def _check_engine_sizes(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of sglang.Engine that the plan computes with and that are no such numbers."""
    for name in _ENGINE_COUNTS:
        number = arguments.get(name)
        if number is not None and (type(number) is not int or number < 1):
            raise R3Error(f"--sglang-args {name} ({number!r}) is not a whole number from 1")
    fraction = arguments.get("mem_fraction_static")
    if fraction is not None and (type(fraction) not in (int, float) or not 0 < fraction < 1):
        raise R3Error(f"--sglang-args mem_fraction_static ({fraction!r}) is not a number between 0 and 1")
