"""`r3 doctor`: how this machine and installation stand."""

import argparse

from r3_adapter.arguments import add_json_argument
from r3_adapter.parsers import Subparsers


def add_doctor(subparsers: Subparsers) -> None:
    """Add `r3 doctor`."""
    text = "check this machine and installation, and say what to do; quote the output when you report a fault"
    parser = subparsers.add_parser(
        "doctor", help=text, description=text, examples=("r3 doctor", "r3 doctor --json doctor.json")
    )
    add_json_argument(parser, "findings")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from r3_adapter.doctor import Grade, examine, summary, to_json

    findings = examine()
    for each in findings:
        print(each, flush=True)
    print(summary(findings))
    if args.json:
        args.json.write_text(to_json(findings) + "\n", encoding="utf-8")
    return 1 if any(each.grade is Grade.BAD for each in findings) else 0
