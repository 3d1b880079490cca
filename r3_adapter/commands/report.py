"""`r3 report`: one page that compares runs."""

import argparse
from pathlib import Path

from r3_adapter.flag_values import output_file
from r3_adapter.parsers import Subparsers

EXAMPLES = ("r3 report run", "r3 report run-with-r3 run-without --out compared.html")


def add_report(subparsers: Subparsers) -> None:
    """Add `r3 report`."""
    text = "write one HTML page that compares runs; seeds of one variant are taken together"
    parser = subparsers.add_parser("report", help=text, description=text, examples=EXAMPLES)
    text = "folder of a run, as --save named it; the run may be under way"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=text)
    parser.add_argument("--out", type=output_file, default="report.html", metavar="FILE", help="the page")
    parser.set_defaults(run=_report_runs)


def _report_runs(args: argparse.Namespace) -> int:
    from r3_adapter.report import last_line
    from r3_adapter.runs.page import write_page
    from r3_adapter.runs.verdict import verdicts

    runs = write_page(args.out, args.runs)
    for said in verdicts(runs):
        print(said)
    for run in runs:
        print(last_line(run.summary, args.out))
    return 0
