"""Samples in Ray's object store: objects for each pipeline stage, with the routes of that stage's layers.

Ray brings an object once to each node that asks for it, into memory that the node's ranks share: a rank reads its own
share of it there, and copies nothing else.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from r3_adapter.errors import R3Error, TraceError
from r3_adapter.rollout import Sample
from r3_adapter.trace import RoutingTrace

# An object costs as much as moving this many bytes.
_OBJECT_BYTES = 1 << 20


@dataclass(frozen=True)
class SampleRef:
    """What the driver holds of a sample: everything but its tokens and routes.

    group: number of the prompt in its batch; index: of the conversation in the group; part: of the sample in the
        conversation, more than one where the engine computed turns again.
    shards: an object for each pipeline stage; place: of the sample in each; digests: of its trace in each.
    num_bytes: of its routes, of all stages.
    """

    group: int
    index: int
    part: int
    num_tokens: int
    num_sampled: int
    shards: tuple["ray.ObjectRef[Any]", ...]
    place: int
    digests: tuple[str, ...]
    num_bytes: int

    @property
    def name(self) -> str:
        return f"prompt {self.group}, sample {self.index}.{self.part}"


@dataclass(frozen=True)
class Placed:
    """A sample's place in its group; index and part as in SampleRef."""

    sample: Sample
    index: int
    part: int


def put_group(group: int, placed: Sequence[Placed], stages: Sequence[Sequence[int]]) -> list[SampleRef]:
    """Put the samples of a prompt into the object store; stages: the global MoE layers of each pipeline stage."""
    refs: list[SampleRef] = []
    for batch in _batches(placed):
        shards, traces = [], []
        for layers in stages:
            # A stage without MoE layers needs the tokens all the same.
            cut = [each.sample.trace.at_layers(layers or each.sample.trace.layer_ids[:1].tolist()) for each in batch]
            shards.append(ray.put([_shard(each.sample, trace) for each, trace in zip(batch, cut, strict=True)]))
            traces.append(cut)
        for place, each in enumerate(batch):
            mine = [cut[place] for cut in traces]
            refs.append(
                SampleRef(
                    group=group,
                    index=each.index,
                    part=each.part,
                    num_tokens=each.sample.trace.num_tokens,
                    num_sampled=int(each.sample.sampled.sum()),
                    shards=tuple(shards),
                    place=place,
                    digests=tuple(trace.digest() for trace in mine),
                    num_bytes=sum(trace.topk_ids.nbytes for trace in mine),
                )
            )
    return refs


def _batches(placed: Sequence[Placed]) -> list[list[Placed]]:
    """Share samples out over objects: small ones have one together, a large one has its own."""
    batches: list[list[Placed]] = []
    room = 0
    for each in placed:
        size = each.sample.trace.topk_ids.nbytes
        if size > room:
            batches.append([])
            room = _OBJECT_BYTES
        batches[-1].append(each)
        room -= size
    return batches


def _shard(sample: Sample, trace: RoutingTrace) -> dict[str, Any]:
    return {
        "trace": np.frombuffer(trace.to_bytes(), np.uint8),
        "logprobs": sample.logprobs,
        "sampled": sample.sampled,
        "num_prompt_tokens": sample.num_prompt_tokens,
    }


def get_samples(refs: Sequence[SampleRef], stage: int, *, timeout: float) -> tuple[list[Sample], dict[int, str]]:
    """Get a stage's shards; return the samples, and by its number what is wrong with each that is lost or damaged.

    Nothing is copied: the traces are views of the object store.
    """
    samples, problems = [], dict[int, str]()
    objects = _get_all({ref.shards[stage] for ref in refs}, timeout)
    for number, ref in enumerate(refs):
        found = objects[ref.shards[stage]]
        try:
            if isinstance(found, Exception):
                raise R3Error(f"lost: {type(found).__name__}")
            shard = found[ref.place]
            trace = RoutingTrace.from_bytes(shard["trace"].data, place=ref.name)
            if (digest := trace.digest()) != ref.digests[stage]:
                raise TraceError(
                    f"{ref.name}: digest {digest} != {ref.digests[stage]} of the sample that was rolled out"
                )
            samples.append(Sample(trace, shard["num_prompt_tokens"], shard["logprobs"], 0, shard["sampled"]))
        except R3Error as error:
            problems[number] = str(error)
    return samples, problems


def _get_all(wanted: Collection["ray.ObjectRef[Any]"], timeout: float) -> dict["ray.ObjectRef[Any]", Any]:
    """Return the objects, and an exception in place of each that is lost."""
    refs = list(wanted)
    try:
        return dict(zip(refs, ray.get(refs, timeout=timeout), strict=True))
    except ray.exceptions.RayError:
        return {ref: _get_one(ref, timeout) for ref in refs}


def _get_one(shard: "ray.ObjectRef[Any]", timeout: float) -> Any:
    try:
        return ray.get(shard, timeout=timeout)
    except ray.exceptions.RayError as error:
        return error
