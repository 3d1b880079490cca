"""What is shown of each family: the self-test's record, and the README's table of it.

python -m r3_adapter.proof.shown [--rollout ENGINE] [FAMILY ...]

Runs the self-test of the families, all of them by default, with expert parallelism over two ranks; keeps in
docs/models.json what was found, in place of what was found before, and writes the README's table again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, get_args

import numpy as np

from r3_adapter.errors import R3Error, UnknownModelError
from r3_adapter.layout import ParallelLayout
from r3_adapter.marks import put
from r3_adapter.megatron.policy_trainer.options import PASSES, TrainerOptions
from r3_adapter.plan.model import ModelShape
from r3_adapter.processes import guarded
from r3_adapter.proof.engine import PERTURBED_SHARE
from r3_adapter.proof.families import NOT_BUILT
from r3_adapter.proof.hf_rollout import Request, hf_rollout, perturbed_hf_rollout
from r3_adapter.proof.models import Model, Rollout, families
from r3_adapter.proof.prove import perturbed_rollout
from r3_adapter.proof.scoring import Work, score_each
from r3_adapter.proof.verdict import Verdict, environment, judge
from r3_adapter.sglang.cpu import has_gpu
from r3_adapter.sglang.meta_model import meta_model

LAYOUT = ParallelLayout.smallest(ep=2)
RECORD, README = Path("docs/models.json"), Path("README.md")
_BEGIN, _END = "<!-- models: written by python -m r3_adapter.proof.shown -->", "<!-- models end -->"
_VERSIONS = ("sglang", "megatron-core", "megatron-bridge", "torch", "transformers")
_ENGINES: Mapping[str, str] = {"sglang on a CPU": "SGLang, CPU", "sglang on a GPU": "SGLang, GPU"}


def prove_families(
    models: Sequence[Model], *, packed: Container[str] = (), seed: int = 0, num_samples: int = 8
) -> list[Verdict]:
    """Run the self-test of several models, which share one trainer of two ranks.

    packed: families whose micro-batches are packed; those of others are padded.

    Raises:
        R3Error: An engine or the trainer fails, or a model that this installation cannot train.
    """
    for model in models:
        model.check()
    with ExitStack() as stack:
        works: list[Work] = []
        for model in models:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model.write(folder, dtype="float32", seed=seed)
            if model.engine == "sglang":
                samples = perturbed_rollout(folder, seed=seed, num_samples=num_samples)
            else:
                samples = perturbed_hf_rollout(folder, seed=seed, fraction=PERTURBED_SHARE, num_samples=num_samples)
            options = TrainerOptions(qkv_format="thd" if model.family in packed else "sbhd")
            works.append(Work(folder, samples, options=options))
        scores = score_each(works, LAYOUT, passes=PASSES)
    about = {"seed": seed, "scene": {}, "injection": None}
    return [
        judge(work.samples, found, LAYOUT, work.options or TrainerOptions(), {**about, **model.about()})
        for model, work, found in zip(models, works, scores, strict=True)
    ]


def planned_share(family: str) -> float | None:
    """Return the planner's count of a family's parameters as a share of transformers'; None where it does not know."""
    config = Model(family).config()
    try:
        shape = ModelShape.from_config(config)
    except UnknownModelError:
        return None
    counted = sum(each.numel() for each in meta_model(config, family).model.parameters())
    return shape.num_parameters() / counted


def replays_itself(family: str, num_samples: int = 4) -> bool:
    """Tell whether Hugging Face's model of a family, perturbed, gives its bits again with the routes recorded of it."""
    model = Model(family)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.write(folder, dtype="float32", seed=0)
        samples = perturbed_hf_rollout(folder, seed=0, fraction=PERTURBED_SHARE, num_samples=num_samples)
        again = hf_rollout(
            folder, [Request.of(sample) for sample in samples], seed=1, replay=[each.trace for each in samples]
        )
    return all(np.array_equal(one.logprobs, two.logprobs) for one, two in zip(samples, again, strict=True))


def found_of(verdict: Verdict) -> dict[str, Any]:
    """Return what the record keeps of a verdict.

    Raises:
        R3Error: It did not pass.
    """
    if not verdict.passed:
        raise R3Error(f"{verdict.about['model']['family']}: {verdict.sentence}")
    versions = environment()["versions"]
    return {
        "date": str(date.today()),
        "versions": {name: versions[name] for name in _VERSIONS if name in versions},
        "tokens": verdict.tokens,
        "max_abs_dlogp_replay": float(f"{verdict.max_abs_dlogp_replay:.1e}"),
        "max_abs_dlogp_live": float(f"{verdict.max_abs_dlogp_live:.2g}"),
    }


def run(names: Sequence[str], rollout: Rollout = "auto") -> dict[str, dict[str, Any]]:
    """Run the self-test of families; return the record's entries, by family.

    Raises:
        R3Error: A family that fails; one that this installation cannot train is recorded as refused.
    """
    entries: dict[str, dict[str, Any]] = {
        name: {"planner": planned_share(name), "replays_itself": replays_itself(name)} for name in names
    }
    models = []
    for name in names:
        model = Model(name, rollout=rollout)
        try:
            model.check()
            models.append(replace(model, rollout=model.engine))
        except R3Error as error:
            entries[name]["refused"] = str(error)
    for model, verdict in zip(models, prove_families(models) if models else [], strict=True):
        place = f" on a {'GPU' if has_gpu() else 'CPU'}" if model.engine == "sglang" else ""
        entries[model.name][model.engine + place] = found_of(verdict)
    return entries


def table(record: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the README's table of a record."""
    lines = ["| Family | Capture: SGLang, CPU | SGLang, GPU | Hugging Face's model | Replay and weights | Planner |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name in families():
        entry = record.get(name, {})
        runs = [entry[key] for key in (*_ENGINES, "transformers") if key in entry]
        cells = ["shown" if entry.get(key) else "not shown" for key in (*_ENGINES, "replays_itself")]
        if runs:
            worst, live = (runs[0][f"max_abs_dlogp_{kind}"] for kind in ("replay", "live"))
            cells.append(f"shown: {worst:.1e}, live {live:.2g}")
        else:
            cells.append(_refused(entry))
        share = entry.get("planner")
        cells.append("not known" if share is None else "exact" if share == 1 else f"{share:.3f} of the parameters")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"| {name} | {'refused | ' * 3}refused: {why} | not known |" for name, why in NOT_BUILT.items()]
    return "\n".join(lines)


def _refused(entry: Mapping[str, Any]) -> str:
    return f"refused: {entry['refused'].partition(': ')[2]}" if "refused" in entry else "not shown"


def with_table(text: str, record: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the README's text with the table of a record between its marks.

    Raises:
        R3Error: It has no marks.
    """
    return put(text, _BEGIN, _END, f"\n{table(record)}\n", str(README))


@guarded()
def main(argv: Sequence[str]) -> int:
    """Run, keep and write; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m r3_adapter.proof.shown", description="show and record families")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(families())}; default: all")
    parser.add_argument("--rollout", choices=get_args(Rollout), default="auto", help="as of r3 prove")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.families) - set(families())):
        parser.error(f"family {unknown[0]!r} is none of {', '.join(families())}")
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for name, entry in run(args.families or families(), args.rollout).items():
        before = {key: value for key, value in record.get(name, {}).items() if key != "refused"}
        record[name] = {**before, **entry}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
