"""`r3 prove --url`: a proof of a server that runs already."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from r3_adapter.commands.output import print_verdict
from r3_adapter.errors import R3Error
from r3_adapter.flag_values import whole

if TYPE_CHECKING:
    from r3_adapter.layout import ParallelLayout
    from r3_adapter.megatron.policy_trainer.options import TrainerOptions

_OF_THE_ENGINE = {
    **{"group": 1, "turns": 1, "retract": False, "dtype": "float32", "sglang_args": {}},
    **{"layers": None, "real_sizes": False, "real_weights": False, "rollout": "auto"},
}
"""Flags of the self-test that say how its own engine is to run, with their defaults."""


def add_url_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a proof of a server."""
    text = "prove a patched SGLang server that runs already, in place of an engine of the self-test's own"
    group = parser.add_argument_group("server", text)
    text = "address of the server, http://HOST:PORT; needs --model, the folder of its checkpoint"
    group.add_argument("--url", metavar="URL", help=text)
    text = "API of the server: /generate, or /v1/completions; default: generate"
    group.add_argument("--api", choices=("generate", "openai"), help=text)
    text = "number of responses to request; default: 32"
    group.add_argument("--samples", type=whole(8), metavar="N", help=text)
    text = "proxy to go through; default: none, also where the environment names one"
    group.add_argument("--proxy", metavar="URL", help=text)


def check_url_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together.

    Raises:
        R3Error: names them.
    """
    if args.url is None:
        for name in ("api", "samples", "proxy"):
            if getattr(args, name) is not None:
                raise R3Error(f"--{name} {getattr(args, name)} needs --url: it describes a server that runs already")
        return
    if not Path(args.model).is_dir():
        raise R3Error(f"--url {args.url} needs --model, the folder of the server's checkpoint; {args.model!r} is none")
    for name, default in _OF_THE_ENGINE.items():
        if getattr(args, name) != default:
            flag = f"--{name.replace('_', '-')}"
            raise R3Error(f"{flag} with --url {args.url}: it is for an engine that the self-test starts")
    if args.place is not None:
        raise R3Error(f"--place {args.place} with --url {args.url}: it is for the self-test's own model only")


def prove_url(args: argparse.Namespace, layout: "ParallelLayout", options: "TrainerOptions") -> int:
    """Prove a server; return the exit code."""
    from r3_adapter.proof.server import NUM_SAMPLES, prove_server
    from r3_adapter.report import progress_bars

    with progress_bars({"server": "is asked what it runs", "trainer": "after the server"}) as progress:
        verdict = prove_server(
            args.url,
            Path(args.model),
            layout,
            options,
            api=args.api or "generate",
            seed=args.seed,
            num_samples=args.samples or NUM_SAMPLES,
            injection=args.inject,
            proxy=args.proxy,
            progress=progress,
        )
    return print_verdict(verdict, args.json)
