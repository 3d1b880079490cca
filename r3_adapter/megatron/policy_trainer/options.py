"""What the trainer's processes are asked to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from r3_adapter.errors import ReplayError, check_choice
from r3_adapter.layout import CpCut, QkvFormat
from r3_adapter.megatron.backends import Backend

Recompute = Literal["none", "full", "moe"]
Dispatcher = Literal["alltoall", "allgather"]

Pass = Literal["live", "replay", "train"]
"""Forward with live routers; forward with routes replayed, as for old log-probabilities; a training step with them."""
PASSES: tuple[Pass, ...] = get_args(Pass)
BESIDE_MICRO_BATCH = 8
"""Samples of a micro-batch of those that are scored beside: more than options ask for, since they are many."""


@dataclass(frozen=True)
class TrainerOptions:
    """How the trainer runs, apart from its layout.

    cp_cut: how context parallelism cuts; "contiguous" comes with an attention of its own, which keeps all scores.
    micro_batch_size: samples in a forward pass of a data-parallel rank.
    dispatch_plan: exchange token counts once a step, where all rows have routes, and not in each MoE layer.
    attach: the back end by which hooks on the model hand it its routes; None to hand them over as an argument.
    distributed_optimizer: shard the optimizer's state over data-parallel ranks.
    place: a file of where experts lie, see balance/table.py; None for the checkpoint's order.
    pipeline_model_parallel_layout: Megatron's string that says which layers each stage and chunk has.
    megatron_arguments: more fields of TransformerConfig, which win over what the checkpoint and these options say.

    Raises:
        ReplayError: a dispatcher, a recomputation, a format, a cut or a back end that is not known.
    """

    dispatcher: Dispatcher = "alltoall"
    recompute: Recompute = "none"
    qkv_format: QkvFormat = "sbhd"
    cp_cut: CpCut = "zigzag"
    micro_batch_size: int = 2
    distributed_optimizer: bool = False
    dispatch_plan: bool = True
    attach: Backend | None = None
    place: str | None = None
    pipeline_model_parallel_layout: str | None = None
    megatron_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("dispatcher", self.dispatcher, Dispatcher, ReplayError)
        check_choice("recompute", self.recompute, Recompute, ReplayError)
        check_choice("qkv_format", self.qkv_format, QkvFormat, ReplayError)
        check_choice("cp_cut", self.cp_cut, CpCut, ReplayError)
        if self.attach is not None:
            check_choice("attach", self.attach, Backend, ReplayError)


@dataclass(frozen=True)
class ScoreRequest:
    """Samples to score; its JSON form is the worker's first argument.

    checkpoint, samples, out: folders; rendezvous: a file that does not exist yet.
    layout, options: the arguments of ParallelLayout and of TrainerOptions.
    passes: some of PASSES, in order.
    beside: a folder of more samples, which are replayed before the weights change; empty for none.

    Raises:
        ReplayError: a pass that is not known.
    """

    checkpoint: str
    samples: str
    out: str
    rendezvous: str
    layout: dict[str, int]
    options: dict[str, Any]
    passes: tuple[str, ...]
    beside: str = ""

    def __post_init__(self) -> None:
        for each in self.passes:
            check_choice("pass", each, Pass, ReplayError)
