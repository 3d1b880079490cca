"""`r3 bench replay --shape`, as a process: a router, a MoE layer and a step, routed live and replayed, in turns.

python -m r3_adapter.bench.shape_process REQUEST.json

All ways of routing share one process, one model and one set of inputs. Each round takes them in another order, each
way has a call that is not timed before those that are, and "live_again" is "live" a second time: how far the two are
apart is what the figures of the others are good for.
"""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from r3_adapter.bench.shape_model import Ways, build_shape, hardware
from r3_adapter.bench.timing import Call, Meter, in_turns
from r3_adapter.errors import R3Error
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.build import initialize

_REPEATS: Mapping[str, int] = {"router": 15, "layer": 3, "step": 1}
"""Timed calls of one way in one round, of which the median counts."""


@dataclass(frozen=True)
class ShapeRequest:
    """What to measure; its JSON form is the process's argument.

    shape: one of SHAPES; num_layers, num_tokens: of the step and the layer; router_tokens: of the router alone.
    rounds: of each part; parts: some of PARTS; out: the file that gets the figures, part by part.
    rendezvous: a file that does not exist yet.
    """

    shape: str
    num_layers: int
    num_tokens: int
    router_tokens: tuple[int, ...]
    rounds: int
    parts: tuple[str, ...]
    out: str
    rendezvous: str


def measure(meter: Meter, calls: Mapping[str, Call], *, rounds: int, part: str) -> dict[str, Any]:
    """Time calls in turns; return for each way its microseconds, its work, and its ratios to the live ways.

    calls: by way; "live" and perhaps "live_fused" are what the others are compared with, round by round.
    """
    launched: dict[str, list[float]] = {way: [] for way in calls}
    hidden: dict[str, list[float]] = {way: [] for way in calls}
    host: dict[str, list[float]] = {way: [] for way in calls}
    for index, order in enumerate(in_turns(list(calls), rounds + 1)):
        for way in order:
            calls[way]()
            with_launches = [meter.launched(calls[way]) for _ in range(_REPEATS[part])]
            # A layer and a step wait for the device in between, so that their launches cannot be hidden.
            alone, until = (
                [timed(calls[way], max(with_launches)) for _ in with_launches] if part == "router" else []
                for timed in (meter.hidden, meter.host)
            )
            if index > 0:
                launched[way].append(statistics.median(with_launches))
                hidden[way] += [statistics.median(alone)] if alone else []
                host[way] += [statistics.median(until)] if until else []
    found = {}
    for way, call in calls.items():
        work = meter.work(call)
        found[way] = {
            "with_launches_us": statistics.median(launched[way]),
            "device_us": statistics.median(hidden[way]) if hidden[way] else work.kernels_us,
            "host_us": statistics.median(host[way]) if host[way] else None,
            **{f"over_{live}": _ratios(launched[way], launched[live]) for live in _lives(calls)},
            **{f"device_over_{live}": _ratios(hidden[way], hidden[live]) for live in _lives(calls) if hidden[way]},
            **{f"host_over_{live}": _ratios(host[way], host[live]) for live in _lives(calls) if host[way]},
            **asdict(work),
        }
    return found


def _lives(calls: Mapping[str, Call]) -> list[str]:
    return [way for way in ("live", "live_fused") if way in calls]


def _ratios(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of ratios within a round: a drift of the machine cancels."""
    ratios = [time / base for time, base in zip(times, baseline, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def bench(request: ShapeRequest, device: torch.device, keep: Callable[[str, Any], None]) -> None:
    """Measure all parts; keep: is given each as soon as it is done.

    Raises:
        R3Error: replay of the model's own routes computes something else than live routing.
    """
    meter = Meter(device)
    model = build_shape(request.shape, request.num_layers, ParallelLayout(), device)
    ways = Ways(model, request.num_tokens, device)
    keep("left_out", ways.left_out)
    if "router" in request.parts:
        for num_tokens in request.router_tokens:
            calls = ways.router_calls(num_tokens)
            keep(f"router {num_tokens}", measure(meter, calls, rounds=request.rounds, part="router"))
    if "layer" in request.parts:
        keep("layer", measure(meter, ways.layer_calls(), rounds=request.rounds, part="layer"))
    if "step" in request.parts:
        keep("step", measure(meter, ways.step_calls(), rounds=request.rounds, part="step"))
    keep("answers", ways.answers)
    wrong = [what for what, found in ways.answers.items() if found is False and "live_fused" not in what]
    if wrong:
        raise R3Error(f"replay of the model's own routes is not live routing: {wrong}")


def main(argv: Sequence[str]) -> None:
    """Measure, and write what is known after each part."""
    request = ShapeRequest(**json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    device = initialize(ParallelLayout(), 0, f"file://{request.rendezvous}")
    figures: dict[str, Any] = {"request": asdict(request), **hardware(device)}

    def keep(name: str, figure: Any) -> None:
        figures[name] = figure
        Path(request.out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: done", flush=True)

    bench(request, device, keep)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
