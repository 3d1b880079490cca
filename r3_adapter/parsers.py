"""How the commands' parsers read and speak: a short usage, each flag's default beside it, examples at the end."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Writes a usage of what must be given alone, and the default of each flag that has one."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 32, **options})

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Iterable[Any], prefix: str | None = None
    ) -> None:
        """Add the usage; argparse's own lists all flags, which is longer than what it stands before."""
        given = list(actions)
        needed = [each for each in given if not each.option_strings or each.required]
        flags = [argparse.Action(["FLAGS"], "", nargs=0)] if len(needed) < len(given) else []
        super().add_usage(usage, [*flags, *needed], [], prefix)

    def _get_help_string(self, action: argparse.Action) -> str:
        return help_of(action)


class OneCommandParser(argparse.ArgumentParser):
    """A parser that refuses what it does not know itself; argparse lets the parser above do it, with its own usage.

    examples: command lines, shown at the end of the help.
    """

    def __init__(self, *, examples: Sequence[str] = (), **options: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, **options})
        self.examples = tuple(examples)
        if examples:
            self.epilog = "\n".join(["examples:", *(f"  {example}" for example in examples)])

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; end with exit code 2 and this parser's usage where words are left over."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


Subparsers: TypeAlias = "argparse._SubParsersAction[OneCommandParser]"
"""What a subcommand adds its parser to."""


def help_of(action: argparse.Action) -> str:
    """Return what the help says of a flag: its line, and its default where that is a value and the line has none."""
    text = action.help or ""
    if "default:" in text or not action.option_strings or action.nargs == 0:
        return text
    if action.default in (None, argparse.SUPPRESS) or action.default in ([], {}):
        return text
    default = action.default
    shown = " ".join(map(str, default)) if isinstance(default, tuple | list) else str(default)
    return f"{text}; default: {shown.replace('%', '%%')}"


def commands_of(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    """Return the parsers that parse flags, each with what is typed for it, as in ("r3 patch apply", parser)."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        return [(parser.prog, parser)]
    return [found for action in below for each in action.choices.values() for found in commands_of(each)]
