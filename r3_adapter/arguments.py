"""Command-line flags, in Megatron's style: each is defined here and nowhere else.

`add_r3_arguments` can be Megatron's extra_args_provider. The others are for launchers that do not go through
megatron.training, whose own parser has the layout flags; the names are the same.
"""

import argparse
import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r3_adapter.megatron.shapes import PARTS, SHAPES

if TYPE_CHECKING:
    from r3_adapter.layout import ParallelLayout

Parser = argparse.ArgumentParser
LARGEST_SEED = 2**31 - 1
"""Engines and data take seeds beside the one given; numpy's are below 2**32."""


def add_r3_arguments(parser: Parser) -> Parser:
    """Add the flags of routing replay; return the parser."""
    group = parser.add_argument_group("r3", "Rollout Routing Replay")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--r3", action="store_true", help="replay the experts that the rollout used")
    which.add_argument("--r2", action="store_true", help="replay those of the trainer's own pass for old log-probs")
    group.add_argument(
        "--r3-staleness",
        choices=("refuse", "live", "keep"),
        default="refuse",
        help="rows that other weights computed: stop the step, route them live, or replay them all the same",
    )
    return parser


def add_r3_offline_arguments(parser: Parser) -> Parser:
    """Add the flags of replay in Megatron's own training loop, on recorded rollouts; return the parser."""
    group = add_r3_arguments(parser).add_argument_group("r3 offline", "training on recorded rollouts")
    group.add_argument(
        "--r3-traces",
        nargs="+",
        type=Path,
        required=True,
        metavar="DIR",
        help="folders of samples, or folders of such folders, as r3_adapter.rollout.save_samples writes them",
    )
    group.add_argument("--r3-weight-version", metavar="NAME", help="rows of other weights are stale; default: none are")
    group.add_argument("--r3-hf-checkpoint", type=Path, metavar="DIR", help="Hugging Face folder to begin from")
    return parser


def add_layout_arguments(parser: Parser) -> Parser:
    """Add Megatron's flags of the parallel layout; return the parser."""
    group = parser.add_argument_group("layout", "of the trainer; names and meaning are Megatron's")
    for name in ("tensor-model-parallel", "pipeline-model-parallel", "context-parallel", "expert-model-parallel"):
        group.add_argument(f"--{name}-size", type=int, default=1, metavar="N")
    group.add_argument("--expert-tensor-parallel-size", type=int, metavar="N", help="default: as tensor")
    group.add_argument("--num-virtual-stages-per-pipeline-rank", type=int, default=1, metavar="N")
    group.add_argument("--data-parallel-size", type=int, metavar="N", help="default: the smallest that fits")
    group.add_argument("--pipeline-model-parallel-layout", metavar="LAYOUT", help='as Megatron has it: "Ett|tttttt|L"')
    group.add_argument("--recompute-granularity", choices=("full", "selective"), help="selective: of the MoE layers")
    group.add_argument("--use-distributed-optimizer", action="store_true")
    group.add_argument("--optimizer-cpu-offload", action="store_true", help="keep the optimizer's state on the host")
    group.add_argument("--micro-batch-size", type=int, default=4, metavar="N")
    group.add_argument(
        "--megatron-args", type=_json_object, default={}, metavar="JSON", help="more fields of TransformerConfig"
    )
    return parser


_LAYOUT_FLAGS = {
    "tp": "tensor-model-parallel-size",
    "pp": "pipeline-model-parallel-size",
    "vpp": "num-virtual-stages-per-pipeline-rank",
    "cp": "context-parallel-size",
    "ep": "expert-model-parallel-size",
    "etp": "expert-tensor-parallel-size",
    "dp": "data-parallel-size",
}


def layout_of(args: argparse.Namespace) -> "ParallelLayout":
    """Return the layout that the flags of add_layout_arguments say.

    Raises:
        LayoutError: sizes that do not fit together.
    """
    from r3_adapter.errors import LayoutError
    from r3_adapter.layout import ParallelLayout

    sizes = {name: getattr(args, flag.replace("-", "_")) for name, flag in _LAYOUT_FLAGS.items()}
    given = {name: size for name, size in sizes.items() if size is not None}
    for name, flag in _LAYOUT_FLAGS.items():
        if given.get(name, 1) < 1:
            raise LayoutError(f"--{flag} ({given[name]}) < 1")
    return ParallelLayout(**given) if "dp" in given else ParallelLayout.smallest(**given)


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a benchmark of a model's shape, which has no weights to read."""
    group = parser.add_argument_group("shape", "a router, a MoE layer and a step of this shape, in place of the above")
    group.add_argument("--shape", choices=tuple(SHAPES), help="weights are random; --pairs: rounds of each part")
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    group.add_argument("--layers", type=whole(1), default=4, metavar="N", help="of the step; default: 4")
    group.add_argument("--tokens", type=whole(16), default=8192, metavar="N", help="of layer and step; default: 8192")
    group.add_argument(
        "--router-tokens", type=whole(16), nargs="+", default=(8192, 65536), metavar="N", help="of the router alone"
    )
    group.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="default: all")


def add_rl_arguments(parser: Parser) -> Parser:
    """Add the flags of the rollouts and of the policy's loss; return the parser."""
    group = parser.add_argument_group("rollout")
    group.add_argument("--rollout-num-engines", type=int, default=1, metavar="N")
    group.add_argument("--rollout-tp-size", type=int, default=1, metavar="N", help="tensor parallel size of an engine")
    group.add_argument("--rollout-pp-size", type=int, default=1, metavar="N", help="pipeline stages of an engine")
    group.add_argument("--rollout-batch-size", type=int, default=16, metavar="N", help="prompts of a step")
    group.add_argument("--n-samples-per-prompt", type=int, default=8, metavar="N")
    group.add_argument("--rollout-max-prompt-len", type=int, default=32, metavar="N", help="tokens of a prompt")
    group.add_argument("--rollout-max-response-len", type=int, default=32, metavar="N", help="tokens of a turn")
    group.add_argument("--rollout-temperature", type=float, default=1.0)
    group.add_argument("--rollout-lag", type=int, default=0, metavar="N", help="steps that rollouts are ahead")
    group.add_argument(
        "--sglang-args", type=_json_object, default={}, metavar="JSON", help="more arguments of sglang.Engine"
    )
    group = parser.add_argument_group("policy")
    group.add_argument("--advantage-estimator", choices=("grpo", "gspo"), default="grpo")
    group.add_argument("--use-tis", action="store_true", help="weigh tokens by trainer / rollout, truncated")
    group.add_argument("--tis-clip", type=float, default=2.0)
    group.add_argument("--eps-clip", type=float, help="default: 0.2; gspo 3e-4")
    group.add_argument("--eps-clip-high", type=float, help="default: as --eps-clip")
    group.add_argument("--kl-loss-coef", type=float, default=0.0, help="of the KL to the reference model")
    group.add_argument("--num-steps-per-rollout", type=int, default=1, metavar="N", help="optimizer steps on a batch")
    group.add_argument("--num-rollout", type=int, default=100, metavar="N", help="steps of the run")
    group.add_argument("--lr", type=float, default=1e-4)
    group.add_argument("--clip-grad", type=float, default=1.0)
    group.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0)
    return parser


def add_run_arguments(parser: Parser) -> Parser:
    """Add what a run is called, begins with and keeps; return the parser."""
    group = parser.add_argument_group("run")
    group.add_argument("--save", type=Path, default=Path("run"), help="folder of the run; a run in it goes on")
    group.add_argument("--name", help="of the run, in reports; default: the folder's")
    group.add_argument("--hf-checkpoint", type=Path, metavar="DIR", help="the first weights")
    group.add_argument("--ray-address", help="of a cluster; default: one is started on this machine")
    group.add_argument("--task", default="sort", help="sort, add, or package.module:Class of your own")
    group.add_argument("--save-interval", type=int, default=20, metavar="N", help="steps between checkpoints")
    group.add_argument("--save-rollouts", type=Path, metavar="DIR", help="keep all samples, for --r3-traces")
    group.add_argument("--gpus-per-rank", type=float, default=0, metavar="N", help="of trainer and engines; 0: none")
    group.add_argument("--sft-steps", type=int, default=150, help="supervised steps of the tiny model before the run")
    return parser


def add_plan_arguments(parser: Parser) -> Parser:
    """Add what only a plan needs to know; return the parser."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--model-config", type=Path, required=True, metavar="FILE", help="config.json, or a checkpoint's folder"
    )
    group.add_argument("--mean-prompt-len", type=int, metavar="N", help="default: the longest")
    group.add_argument("--mean-response-len", type=int, metavar="N", help="default: the longest")
    group.add_argument("--gpus-per-node", type=int, default=8, metavar="N")
    group.add_argument("--num-nodes", type=int, metavar="N", help="default: as many as it takes")
    group.add_argument("--gpu-memory-gib", type=float, default=79, metavar="N", help="of each GPU")
    group.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here too")
    return parser


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, such as '{{\"name\": 1}}'")
    return value


def output_file(text: str) -> Path:
    """Return the path of a file that a command will write, once it is known that it can: before the work, not after.

    Raises:
        argparse.ArgumentTypeError: it cannot.
    """
    path = Path(text)
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: is a folder, not a file")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{path.parent}: no such folder")
        _try_to_write(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot be written: {error.strerror}") from error
    return path


def _try_to_write(path: Path) -> None:
    """Open a file as whoever writes it will, and leave everything as it was."""
    if path.exists() and not path.is_file():
        # To open a pipe and close it would end it for its reader.
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        os.close(os.open(path, os.O_WRONLY))
    else:
        path.unlink()


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder that a command will write to, with those above it, and see that it can.

    Raises:
        R3Error: it cannot be made or written to.
    """
    from r3_adapter.errors import R3Error

    try:
        folder.mkdir(parents=True, exist_ok=True, mode=mode)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise R3Error(f"{folder}: cannot be written to: {error.strerror}") from error


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the type of a flag that takes whole numbers of this range; LARGEST_SEED is the most of a seed."""

    def number(text: str) -> int:
        try:
            found = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
        if found < least:
            raise argparse.ArgumentTypeError(f"{found} < {least}")
        if most is not None and found > most:
            raise argparse.ArgumentTypeError(f"{found} > {most}")
        return found

    return number


class OneCommandParser(argparse.ArgumentParser):
    """A parser that refuses what it does not know itself; argparse lets the parser above do it, with its own usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; end with exit code 2 and this parser's usage where words are left over."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown
