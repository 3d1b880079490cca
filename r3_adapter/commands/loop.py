"""The parser of launch/grpo.sh, which is no subcommand of `r3`: a run needs Ray, and may be changed as a script."""

from r3_adapter.arguments import (
    add_balance_arguments,
    add_layout_arguments,
    add_r3_arguments,
    add_rl_arguments,
    add_run_arguments,
)
from r3_adapter.parsers import OneCommandParser

TEXT = """GRPO with SGLang rollouts and Megatron training on Ray; --r3 replays the rollout's routes.

Without --hf-checkpoint a tiny model learns to sort digits on this machine, no GPU needed."""
EXAMPLES = (
    "launch/grpo.sh --r3 --save run",
    "launch/grpo.sh --r3 --ep 2 --save run --save-rollouts rollouts",
    "launch/grpo.sh --r3 --hf-checkpoint model --prompt-data prompts.jsonl --custom-rm-path rewards.score",
)


def loop_parser() -> OneCommandParser:
    """Return the parser of all flags of a run."""
    parser = OneCommandParser(prog="launch/grpo.sh", description=TEXT, examples=EXAMPLES)
    for add in (add_r3_arguments, add_balance_arguments, add_layout_arguments, add_rl_arguments, add_run_arguments):
        add(parser)
    return parser
