"""The tables of the experiment before this one, whose figures results.json keeps; its code is gone."""

from collections.abc import Mapping
from typing import Any


def page(results: Mapping[str, Any]) -> str:
    """Return its three tables."""
    return "\n\n".join([_static(results), _runs(results["rl"]), _stale(results["staleness"])])


def _static(results: Mapping[str, Any]) -> str:
    moe, dense = results["static"]["moe"], results["static"]["dense"]
    differ = [f"{moe['routers_that_differ']:.1%}", f"{moe['tokens_that_differ']:.1%} \\*"]
    sides = {
        "live": (moe["live"], *differ),
        "routes replayed": (moe["replay"], "0", "0"),
        "dense control": (dense["live"], "", ""),
        "the engine against itself: prefill for decode \\*": (moe["engine"], "", ""),
        "the trainer against itself, in other micro-batches": (moe["floor"], "", ""),
    }
    lines = [
        "| With fixed weights | k3 KL | F(1.2) | F(2) | routers that differ | tokens that differ somewhere |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (side, rows, tokens) in sides.items():
        figures = [_number(side["k3"]), _number(side["f"]["1.2"]), _number(side["f"]["2.0"])]
        lines.append(f"| {' | '.join([name, *figures, rows, tokens])} |")
    ratio = f"Replayed over live: k3 KL {results['kl_ratio']:.3f} (aim 0.15), F(2) {results['f2_ratio']:g}; "
    return "\n".join(lines) + f"\n\n{ratio}{results['response_tokens']:,} response tokens."


def _runs(table: Mapping[str, Any]) -> str:
    lines = [
        "| Over 100 RL steps | k3 KL | F(2) | reward, first and last tenth | collapsed | R3's share of a step \\* | "
        "memory of trainer and engine \\* |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in table.items():
        memory = " , ".join(f"{row['resident_bytes'][each] / 1e9:.2f}" for each in ("trainer_rss", "engine_rss"))
        cells = [name, _number(row["k3"]), _number(row["f2"]), f"{row['reward_first']:.3f}, {row['reward']:.3f}"]
        cells += [f"{row['collapsed']} of {len(row['reward_by_seed'])}", f"{row['r3_share']:.1%}"]
        lines.append(f"| {' | '.join([*cells, memory.replace(' ,', ',') + ' GB'])} |")
    return "\n".join(lines)


def _stale(found: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"| Weights newer than the routes by, in steps | {' | '.join(found)} |", "| --- |" + " --- |" * len(found)]
    for name, title in (("live", "k3 KL, live"), ("replay", "k3 KL, stale routes replayed")):
        lines.append(f"| {title} | {' | '.join(_number(each[name]) for each in found.values())} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"
