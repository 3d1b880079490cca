"""Command-line flags, in Megatron's style: each is defined here and nowhere else.

`add_r3_arguments` can be Megatron's extra_args_provider. The others are for launchers that do not go through
megatron.training, whose own parser has the layout flags; the names are the same.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r3_adapter.flag_values import LARGEST_SEED, json_object, output_file, whole
from r3_adapter.model_shapes import PARTS, SHAPES

if TYPE_CHECKING:
    from r3_adapter.layout import ParallelLayout
    from r3_adapter.megatron.policy_trainer.options import Recompute

Parser = argparse.ArgumentParser

LAYOUT_FLAGS = {
    "tp": ("--tensor-model-parallel-size", "ranks that share each layer's matrices (tensor parallelism)"),
    "pp": ("--pipeline-model-parallel-size", "pipeline stages that the layers are cut into"),
    "vpp": ("--num-virtual-stages-per-pipeline-rank", "model chunks of a pipeline stage"),
    "cp": ("--context-parallel-size", "ranks that share each sample's tokens (context parallelism)"),
    "ep": ("--expert-model-parallel-size", "ranks that share a layer's experts (expert parallelism)"),
    "etp": ("--expert-tensor-parallel-size", "ranks that share each expert's matrices; default: as --tp"),
    "dp": ("--data-parallel-size", "copies of the dense layers; default: the fewest that the layout allows"),
}
"""Megatron's name of each size of a layout, by its short one, which is an alias everywhere; and what it is."""

SKEWS = ("mild", "medium", "strong")
"""Of simulated routes."""

RECOMPUTE: Mapping[str | None, "Recompute"] = {None: "none", "full": "full", "selective": "moe"}
"""What TrainerOptions calls each --recompute-granularity."""


def add_size(parser: Any, name: str, **options: Any) -> None:
    """Add the flag of one size of a layout under its long and its short name, to a parser or a group of one.

    name: of LAYOUT_FLAGS.
    """
    flag, text = LAYOUT_FLAGS[name]
    default = None if name in ("etp", "dp") else 1
    given = {"type": whole(1), "default": default, "metavar": "N", "help": text, **options}
    parser.add_argument(flag, f"--{name}", **given)


def add_short_sizes(parser: Any) -> None:
    """Add the short names of a layout's sizes to a parser that has Megatron's long ones."""
    for name, (flag, _) in LAYOUT_FLAGS.items():
        if name != "dp":  # Megatron's own comes from the number of ranks.
            options = {"dest": flag.removeprefix("--").replace("-", "_"), "default": argparse.SUPPRESS}
            parser.add_argument(f"--{name}", type=int, metavar="N", help=f"the same as {flag}", **options)


def add_r3_arguments(parser: Parser) -> Parser:
    """Add the flags of routing replay; return the parser."""
    group = parser.add_argument_group("r3", "Rollout Routing Replay")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--r3", action="store_true", help="replay the experts that the rollout used")
    text = "replay the experts that the trainer itself used when it computed the old log-probabilities"
    which.add_argument("--r2", action="store_true", help=text)
    text = "what to do with rows that other weights computed: stop the step, route live, or replay them all the same"
    group.add_argument("--r3-staleness", choices=("refuse", "live", "keep"), default="refuse", help=text)
    return parser


def add_r3_offline_arguments(parser: Parser) -> Parser:
    """Add the flags of replay in Megatron's own training loop, on recorded rollouts; return the parser."""
    group = add_r3_arguments(parser).add_argument_group("r3 offline", "training on recorded rollouts")
    text = "folders of samples, or folders of such folders, as --save-rollouts writes them"
    group.add_argument("--r3-traces", nargs="+", type=Path, required=True, metavar="DIR", help=text)
    text = "weight version of the trainer: routes of another are stale; default: not checked"
    group.add_argument("--r3-weight-version", metavar="NAME", help=text)
    text = "Hugging Face checkpoint whose weights training starts from"
    group.add_argument("--r3-hf-checkpoint", type=Path, metavar="DIR", help=text)
    add_short_sizes(parser.add_argument_group("r3 layout", "short names of Megatron's flags"))
    return parser


def add_balance_arguments(parser: Parser) -> Parser:
    """Add the flags of even loads of expert-parallel ranks; return the parser."""
    group = parser.add_argument_group("r3 balance", "even loads of the expert-parallel ranks")
    text = "compose micro-batches by length (off), at random, or by the loads of routes; place: also move experts"
    group.add_argument("--r3-balance", choices=("off", "shuffle", "pack", "place"), default="off", help=text)
    text = "placement of the experts, which `r3 balance TRACES --placement FILE` writes"
    group.add_argument("--r3-placement", type=Path, metavar="FILE", help=text)
    text = "stop before a step in which a rank would receive more tokens in a layer; with --r3-balance pack or place"
    group.add_argument("--r3-max-received", type=whole(1), metavar="N", help=text)
    return parser


def add_parallel_arguments(parser: Parser) -> Any:
    """Add the flags that say how a trainer shares a model out, in Megatron's names; return their group."""
    group = parser.add_argument_group("layout", "of the trainer; names and meaning are Megatron's")
    for name in LAYOUT_FLAGS:
        add_size(group, name)
    text = 'which layers each pipeline stage has, such as "Ett|tttttt|L"; default: as many in each'
    group.add_argument("--pipeline-model-parallel-layout", metavar="LAYOUT", help=text)
    text = "compute activations again in the backward pass: of all layers, or of the MoE layers; default: none"
    group.add_argument("--recompute-granularity", choices=("full", "selective"), help=text)
    text = "shard the optimizer's state over data-parallel ranks"
    group.add_argument("--use-distributed-optimizer", action="store_true", help=text)
    return group


def add_layout_arguments(parser: Parser) -> Parser:
    """Add Megatron's flags of the trainer; return the parser."""
    group = add_parallel_arguments(parser)
    group.add_argument("--optimizer-cpu-offload", action="store_true", help="keep the optimizer's state on the host")
    group.add_argument("--micro-batch-size", type=int, default=4, metavar="N", help="samples of a micro-batch")
    text = "more fields of TransformerConfig, such as '{\"attention_softmax_in_fp32\": true}'"
    group.add_argument("--megatron-args", type=json_object, default={}, metavar="JSON", help=text)
    return parser


def layout_of(args: argparse.Namespace) -> "ParallelLayout":
    """Return the layout that the flags of add_parallel_arguments say.

    Raises:
        LayoutError: sizes that do not fit together.
    """
    from r3_adapter.errors import LayoutError
    from r3_adapter.layout import ParallelLayout

    flags = {name: flag for name, (flag, _) in LAYOUT_FLAGS.items()}
    sizes = {name: getattr(args, flag.removeprefix("--").replace("-", "_")) for name, flag in flags.items()}
    given = {name: size for name, size in sizes.items() if size is not None}
    for name, size in given.items():
        if size < 1:
            raise LayoutError(f"{flags[name]} ({size}) < 1")
    return ParallelLayout(**given) if "dp" in given else ParallelLayout.smallest(**given)


def add_json_argument(parser: Any, what: str = "results") -> None:
    """Add the flag of the file that a command writes beside what it prints, to a parser or a group of one."""
    parser.add_argument("--json", type=output_file, metavar="FILE", help=f"write the {what} to this file too")


def add_seed_argument(parser: Any, text: str) -> None:
    """Add the flag of the seed, to a parser or a group of one."""
    parser.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0, metavar="N", help=text)


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a benchmark of a model's shape, which has no weights to read."""
    text = "a router, a MoE layer and a step of a real model's shape, in place of the small model"
    group = parser.add_argument_group("shape", text)
    text = "the shape, with random weights; --pairs is then the rounds of each part"
    group.add_argument("--shape", choices=tuple(SHAPES), help=text)
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    group.add_argument("--layers", type=whole(1), default=4, metavar="N", help="layers of the step")
    group.add_argument("--tokens", type=whole(16), default=8192, metavar="N", help="tokens of the layer and the step")
    text = "tokens of the router, timed for each number"
    group.add_argument("--router-tokens", type=whole(16), nargs="+", default=(8192, 65536), metavar="N", help=text)
    group.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="what is timed")


def add_capture_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a benchmark of capture on a model's shape."""
    group = parser.add_argument_group("shape", "engines of a real model's shape, in place of a small model")
    group.add_argument("--shape", choices=tuple(SHAPES), help="the shape, with random weights")
    text = "where the engines run: cuda, or cpu for a rehearsal"
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=text)
    text = "layers of the model; default: 12, with which three engines fit in 80 GB"
    group.add_argument("--layers", type=whole(1), default=12, metavar="N", help=text)
    add_engine_arguments(group)


def add_rl_arguments(parser: Parser) -> Parser:
    """Add the flags of the rollouts and of the policy's loss; return the parser."""
    group = parser.add_argument_group("rollout", "of a step")
    group.add_argument("--rollout-num-engines", type=int, default=1, metavar="N", help="SGLang engines")
    group.add_argument("--rollout-tp-size", type=int, default=1, metavar="N", help="tensor parallel size of an engine")
    group.add_argument("--rollout-pp-size", type=int, default=1, metavar="N", help="pipeline stages of an engine")
    group.add_argument("--rollout-batch-size", type=int, default=16, metavar="N", help="prompts of a step")
    group.add_argument("--n-samples-per-prompt", type=int, default=8, metavar="N", help="responses to each prompt")
    text = "most tokens of a prompt"
    group.add_argument("--rollout-max-prompt-len", type=int, default=32, metavar="N", help=text)
    text = "most tokens of a response, of each turn in a conversation"
    group.add_argument("--rollout-max-response-len", type=int, default=32, metavar="N", help=text)
    group.add_argument("--rollout-temperature", type=float, default=1.0, metavar="X", help="sampling temperature")
    text = "steps that rollouts are ahead of the trainer"
    group.add_argument("--rollout-lag", type=int, default=0, metavar="N", help=text)
    text = "weights of the engines: as-trained, or for experiments fp8-rounded, to e4m3 in blocks of 128"
    kinds = ("as-trained", "fp8-rounded")
    group.add_argument("--rollout-weights", choices=kinds, default="as-trained", help=text)
    add_engine_arguments(group)
    group = parser.add_argument_group("policy", "its loss and its optimizer")
    text = "token-level ratios (grpo) or one ratio a sequence (gspo)"
    group.add_argument("--advantage-estimator", choices=("grpo", "gspo"), default="grpo", help=text)
    text = "weigh each token's loss by the trainer's probability over the rollout's, truncated"
    group.add_argument("--use-tis", action="store_true", help=text)
    group.add_argument("--tis-clip", type=float, default=2.0, metavar="X", help="largest weight of --use-tis")
    text = "how far below 1 a ratio may go before it is clipped; default: 0.2, with gspo 3e-4"
    group.add_argument("--eps-clip", type=float, metavar="X", help=text)
    text = "how far above 1 a ratio may go; default: as --eps-clip"
    group.add_argument("--eps-clip-high", type=float, metavar="X", help=text)
    text = "coefficient of the KL divergence from the reference model"
    group.add_argument("--kl-loss-coef", type=float, default=0.0, metavar="X", help=text)
    text = "optimizer steps on the samples of one rollout"
    group.add_argument("--num-steps-per-rollout", type=int, default=1, metavar="N", help=text)
    group.add_argument("--num-rollout", type=int, default=100, metavar="N", help="steps of the run")
    _add_learning_rate(group)
    text = "largest norm of the gradient; 0: no clipping"
    group.add_argument("--clip-grad", type=float, default=1.0, metavar="X", help=text)
    add_seed_argument(group, "seed of prompts, sampling and random weights")
    return parser


def _add_learning_rate(group: Any) -> None:
    group.add_argument("--lr", type=float, default=1e-4, metavar="X", help="learning rate at its peak")
    group.add_argument("--min-lr", type=float, default=0.0, metavar="X", help="learning rate where its decay ends")
    styles = ("constant", "linear", "cosine", "inverse-square-root")
    text = "how the learning rate falls"
    group.add_argument("--lr-decay-style", choices=styles, default="constant", help=text)
    text = "optimizer steps in which the learning rate rises to its peak"
    group.add_argument("--lr-warmup-iters", type=whole(0), default=0, metavar="N", help=text)
    text = "optimizer steps until --min-lr, warm-up included; default: those of the run"
    group.add_argument("--lr-decay-iters", type=whole(1), metavar="N", help=text)


def add_engine_arguments(parser: Any) -> None:
    """Add the flag of what SGLang is told beside what other flags say, to a parser or a group of one."""
    text = "more arguments of sglang.Engine, such as '{\"page_size\": 64}'"
    parser.add_argument("--sglang-args", type=json_object, default={}, metavar="JSON", help=text)


def add_run_arguments(parser: Parser) -> Parser:
    """Add what a run is called, begins with and keeps; return the parser."""
    group = parser.add_argument_group("run")
    text = "folder of the run; a run that is there is resumed"
    group.add_argument("--save", type=Path, default=Path("run"), metavar="DIR", help=text)
    group.add_argument("--name", help="name of the run in reports; default: the folder's")
    text = "checkpoint that the run starts from; default: a tiny model with random weights"
    group.add_argument("--hf-checkpoint", type=Path, metavar="DIR", help=text)
    text = "address of a Ray cluster; default: one is started on this machine"
    group.add_argument("--ray-address", metavar="ADDRESS", help=text)
    text = "prompts and reward: sort, add, running, running-24, or package.module:Class of your own"
    group.add_argument("--task", default="sort", metavar="NAME", help=text)
    group.add_argument("--save-interval", type=int, default=20, metavar="N", help="steps between checkpoints")
    group.add_argument("--keep-checkpoints", type=whole(1), default=2, metavar="N", help="newest checkpoints to keep")
    text = "steps between evaluations; default: no evaluation"
    group.add_argument("--eval-interval", type=whole(1), metavar="N", help=text)
    text = "prompts of an evaluation, which training never sees"
    group.add_argument("--eval-prompts", type=whole(1), default=64, metavar="N", help=text)
    text = "package.module:function that gets each step's metrics, beside TensorBoard; may be given more than once"
    group.add_argument("--tracker", action="append", default=[], metavar="NAME", help=text)
    text = "folder that keeps all samples with their routes, for --r3-traces"
    group.add_argument("--save-rollouts", type=Path, metavar="DIR", help=text)
    text = "GPUs of each rank of trainer and engines"
    group.add_argument("--gpus-per-rank", type=float, default=0, metavar="N", help=text)
    text = "supervised steps that teach the tiny model something before the run"
    group.add_argument("--sft-steps", type=int, default=150, metavar="N", help=text)
    data = parser.add_argument_group("data", "prompts of a file, in place of --task; needs --hf-checkpoint")
    text = "file with one prompt in each row, .jsonl or .parquet"
    data.add_argument("--prompt-data", type=Path, metavar="FILE", help=text)
    data.add_argument("--input-key", default="input", metavar="KEY", help="column of the prompt")
    text = "column that is given to the reward as label; default: none"
    data.add_argument("--label-key", metavar="KEY", help=text)
    text = "put each prompt, a text or messages, in the tokenizer's chat template"
    data.add_argument("--apply-chat-template", action="store_true", help=text)
    text = "reward: package.module.function(prompt, response, label), which returns a number"
    data.add_argument("--custom-rm-path", metavar="NAME", help=text)
    return parser


def add_plan_arguments(parser: Parser) -> Parser:
    """Add what only a plan needs to know; return the parser."""
    group = parser.add_argument_group("plan")
    text = "config.json of the model, or the folder of its checkpoint"
    group.add_argument("--model-config", type=Path, required=True, metavar="FILE", help=text)
    text = "tokens of a prompt on average; default: the most, --rollout-max-prompt-len"
    group.add_argument("--mean-prompt-len", type=int, metavar="N", help=text)
    text = "tokens of a response on average; default: the most, --rollout-max-response-len"
    group.add_argument("--mean-response-len", type=int, metavar="N", help=text)
    group.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a machine")
    group.add_argument("--num-nodes", type=int, metavar="N", help="machines; default: as many as needed")
    group.add_argument("--gpu-memory-gib", type=float, default=79, metavar="X", help="memory of each GPU, in GiB")
    add_json_argument(group)
    group = parser.add_argument_group("loads", "also say how even the loads of the expert-parallel ranks are")
    text = "use the routes in these folders, which --save-rollouts wrote"
    group.add_argument("--traces", nargs="+", type=Path, metavar="DIR", help=text)
    text = "use simulated routes of this skew, in place of recorded ones"
    group.add_argument("--skew", choices=SKEWS, help=text)
    text = "share of a step's time that grows with the fullest rank's load; default: 0.4, an assumption"
    group.add_argument("--expert-share", type=float, default=0.4, metavar="X", help=text)
    return parser
