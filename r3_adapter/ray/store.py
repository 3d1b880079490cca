"""Samples in Ray's object store: objects for each pipeline stage, with the routes of that stage's layers.

Ray brings an object once to each node that asks for it, into memory that the node's ranks share: a rank reads its own
share of it there, and copies nothing else.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from r3_adapter.balance.loads import count_trace
from r3_adapter.errors import R3Error, TraceError
from r3_adapter.frozen import freeze
from r3_adapter.rollout import Sample
from r3_adapter.trace import RoutingTrace, concatenate

OBJECT_BYTES = 1 << 20
"""An object costs as much as moving this many bytes."""


@dataclass(frozen=True)
class SampleRef:
    """What the driver holds of a sample: everything but its tokens and routes.

    group: number of the prompt in its batch; index: of the conversation in the group; part: of the sample in the
        conversation, more than one where the engine computed turns again.
    objects: one for each pipeline stage; start: place of the sample's first token in each.
    digests: of the sample's rows in each.
    num_bytes: of its routes, of all stages.
    temperature: as in Sample.
    counts: [M, E] int32, tokens at each expert; None unless they were asked for.
    """

    group: int
    index: int
    part: int
    num_tokens: int
    num_prompt_tokens: int
    num_sampled: int
    objects: tuple["ray.ObjectRef[Any]", ...]
    start: int
    digests: tuple[str, ...]
    num_bytes: int
    temperature: float = 1.0
    counts: npt.NDArray[np.int32] | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return f"prompt {self.group}, sample {self.index}.{self.part}"


@dataclass(frozen=True)
class Placed:
    """A sample and its place in its batch; group, index and part as in SampleRef."""

    sample: Sample
    group: int
    index: int
    part: int


def put_samples(placed: Sequence[Placed], stages: Sequence[Sequence[int]], *, counted: bool = False) -> list[SampleRef]:
    """Put samples into the object store.

    stages: the global MoE layers of each pipeline stage. counted: let references say how many tokens each expert has.
    """
    return [ref for batch in _batches(placed) for ref in _put(batch, stages, counted)]


def _batches(placed: Sequence[Placed]) -> list[list[Placed]]:
    """Share samples out over objects: small ones have one together, a large one has its own."""
    batches: list[list[Placed]] = []
    room = 0
    for each in placed:
        size = each.sample.trace.topk_ids.nbytes
        if size > room:
            batches.append([])
            room = OBJECT_BYTES
        batches[-1].append(each)
        room -= size
    return batches


def _put(batch: Sequence[Placed], stages: Sequence[Sequence[int]], counted: bool) -> list[SampleRef]:
    samples = [each.sample for each in batch]
    together = concatenate([sample.trace for sample in samples])
    # A stage without MoE layers needs the tokens all the same.
    traces = [together.at_layers(layers or together.layer_ids[:1].tolist()) for layers in stages]
    starts = np.cumsum([0, *(sample.trace.num_tokens for sample in samples)]).tolist()
    logprobs, sampled = np.zeros(starts[-1], np.float32), np.zeros(starts[-1], np.bool_)
    for sample, stop in zip(samples, starts[1:], strict=True):
        response = slice(stop - sample.num_response_tokens, stop)
        logprobs[response], sampled[response] = sample.logprobs, sample.sampled
    objects = tuple(
        ray.put({"trace": np.frombuffer(trace.to_bytes(), np.uint8), "logprobs": logprobs, "sampled": sampled})
        for trace in traces
    )
    row_bytes = sum(trace.topk_ids[0].nbytes for trace in traces)
    return [
        SampleRef(
            group=each.group,
            index=each.index,
            part=each.part,
            num_tokens=stop - start,
            num_prompt_tokens=each.sample.num_prompt_tokens,
            num_sampled=int(each.sample.sampled.sum()),
            objects=objects,
            start=start,
            digests=tuple(trace.rows(start, stop).digest() for trace in traces),
            num_bytes=(stop - start) * row_bytes,
            temperature=each.sample.temperature,
            counts=count_trace(each.sample.trace) if counted else None,
        )
        for each, (start, stop) in zip(batch, pairwise(starts), strict=True)
    ]


def get_samples(refs: Sequence[SampleRef], stage: int, *, timeout: float) -> tuple[list[Sample], dict[int, str]]:
    """Get a stage's objects; return the samples, and by its number what is wrong with each that is lost or damaged.

    Nothing is copied: the traces are views of the object store.
    """
    found = _get_all({ref.objects[stage] for ref in refs}, timeout)
    opened = {ref: _open(each) for ref, each in found.items()}
    samples, problems = [], dict[int, str]()
    for number, ref in enumerate(refs):
        place = ref.objects[stage]
        try:
            samples.append(_sample(ref, opened[place], found[place], ref.digests[stage]))
        except R3Error as error:
            problems[number] = str(error)
    return samples, problems


def _open(found: Any) -> RoutingTrace | R3Error:
    """Return the rows of an object, or why there are none."""
    if isinstance(found, Exception):
        return R3Error(f"lost: {type(found).__name__}")
    try:
        # Nobody writes an object of the store, so that the trace can lie in it.
        return RoutingTrace.from_bytes(freeze(found["trace"]).data, place="object")
    except TraceError as error:
        return error


def _sample(ref: SampleRef, rows: RoutingTrace | R3Error, found: Any, digest: str) -> Sample:
    if isinstance(rows, R3Error):
        raise rows
    trace = rows.rows(ref.start, ref.start + ref.num_tokens)
    if trace.digest() != digest:
        raise TraceError(f"digest {trace.digest()} != {digest} of the sample that was rolled out")
    response = slice(ref.start + ref.num_prompt_tokens, ref.start + ref.num_tokens)
    logprobs, sampled = found["logprobs"][response], found["sampled"][response]
    return Sample(trace, ref.num_prompt_tokens, logprobs, 0, sampled, ref.temperature)


def _get_all(wanted: Collection["ray.ObjectRef[Any]"], timeout: float) -> dict["ray.ObjectRef[Any]", Any]:
    """Return the objects, and an exception in place of each that is lost."""
    refs = list(wanted)
    try:
        return dict(zip(refs, ray.get(refs, timeout=timeout), strict=True))
    except ray.exceptions.RayError:
        return {ref: _get_one(ref, timeout) for ref in refs}


def _get_one(wanted: "ray.ObjectRef[Any]", timeout: float) -> Any:
    try:
        return ray.get(wanted, timeout=timeout)
    except ray.exceptions.RayError as error:
        return error
