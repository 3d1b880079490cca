"""Writes docs/reference/cli.md from the parsers: `python -m r3_adapter.commands.reference`."""

import argparse
from pathlib import Path

from r3_adapter.cli import make_parser
from r3_adapter.commands.loop import loop_parser
from r3_adapter.parsers import OneCommandParser, commands_of, help_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "cli.md"
HEAD = """# Commands

Written by `python -m r3_adapter.commands.reference` from what `--help` says. Sizes of a layout have Megatron's names
everywhere, and short ones beside them. Exit codes: 0 done, 1 a check said no, 2 refused, 128 + the number of the signal
that ended a command.
"""


def reference() -> str:
    """Return the page: each command with its flags by group, and its examples."""
    parser = make_parser()
    version = next(each for each in parser._actions if "--version" in each.option_strings)
    parts = [HEAD, f"`r3 --version`: {help_of(version)}.\n"]
    for command, found in [*commands_of(parser), *commands_of(loop_parser())]:
        about, usage = found.description or "", found.format_usage().removeprefix("usage: ")
        parts += [f"## {command}\n", f"{about[:1].upper()}{about[1:].removesuffix('.')}.\n"]
        parts.append(f"    {' '.join(usage.split())}\n")
        parts += [text for group in found._action_groups if (text := _group(group))]
        if isinstance(found, OneCommandParser) and found.examples:
            parts.append("\n".join(["Examples:\n", *(f"    {example}" for example in found.examples), ""]))
    return "\n".join(parts)


def _group(group: argparse._ArgumentGroup) -> str:
    rows = [_row(action) for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
    if not rows:
        return ""
    about = f": {group.description}" if group.description else ""
    return "\n".join([f"**{group.title}**{about}\n", "| Flag | What |", "| --- | --- |", *rows, ""])


def _row(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else str(action.metavar or "|".join(action.choices or [action.dest]))
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    cells = f"{names} `{value}`" if names and value else names or f"`{value}`", help_of(action) % {}
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(reference(), encoding="utf-8")
