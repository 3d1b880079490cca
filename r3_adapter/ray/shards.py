"""Samples in Ray's object store: one object for each pipeline stage, with the routes of that stage's layers.

Ray brings an object once to each node that asks for it, into memory that the node's ranks share: a rank reads its own
share of it there, and copies nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from r3_adapter.errors import R3Error, TraceError
from r3_adapter.rollout import Sample
from r3_adapter.trace import RoutingTrace


@dataclass(frozen=True)
class SampleRef:
    """What the driver holds of a sample: everything but its tokens and routes.

    group: number of the prompt in its batch; index: of the conversation in the group; part: of the sample in the
        conversation, more than one where the engine computed turns again.
    shards: an object for each pipeline stage; digests: of the trace in each.
    num_bytes: of all shards.
    weight_versions: of the rows.
    """

    group: int
    index: int
    part: int
    reward: float
    num_tokens: int
    num_sampled: int
    shards: tuple["ray.ObjectRef[Any]", ...]
    digests: tuple[str, ...]
    num_bytes: int
    weight_versions: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"prompt {self.group}, sample {self.index}.{self.part}"


def put_sample(
    sample: Sample, stages: Sequence[Sequence[int]], *, group: int, index: int, part: int, reward: float
) -> SampleRef:
    """Put a sample into the object store; stages: the global MoE layers of each pipeline stage."""
    shards, digests, num_bytes = [], [], 0
    for layers in stages:
        # A stage without MoE layers needs the tokens all the same.
        trace = sample.trace.at_layers(layers or sample.trace.layer_ids[:1].tolist())
        data = trace.to_bytes()
        shard = {
            "trace": np.frombuffer(data, np.uint8),
            "logprobs": sample.logprobs,
            "sampled": sample.sampled,
            "num_prompt_tokens": sample.num_prompt_tokens,
        }
        shards.append(ray.put(shard))
        digests.append(trace.digest())
        num_bytes += len(data)
    return SampleRef(
        group=group,
        index=index,
        part=part,
        reward=reward,
        num_tokens=sample.trace.num_tokens,
        num_sampled=int(sample.sampled.sum()),
        shards=tuple(shards),
        digests=tuple(digests),
        num_bytes=num_bytes,
        weight_versions=sample.trace.weight_versions,
    )


def get_samples(refs: Sequence[SampleRef], stage: int, *, timeout: float) -> tuple[list[Sample], dict[int, str]]:
    """Get a stage's shards; return the samples, and by its place what is wrong with each that is lost or damaged.

    Nothing is copied: the traces are views of the object store.
    """
    samples, problems = [], dict[int, str]()
    for place, (ref, shard) in enumerate(zip(refs, _get_all(refs, stage, timeout), strict=True)):
        try:
            if isinstance(shard, Exception):
                raise R3Error(f"lost: {type(shard).__name__}")
            trace = RoutingTrace.from_bytes(shard["trace"].data, place=ref.name)
            if (digest := trace.digest()) != ref.digests[stage]:
                raise TraceError(
                    f"{ref.name}: digest {digest} != {ref.digests[stage]} of the sample that was rolled out"
                )
            samples.append(Sample(trace, shard["num_prompt_tokens"], shard["logprobs"], 0, shard["sampled"]))
        except R3Error as error:
            problems[place] = str(error)
    return samples, problems


def _get_all(refs: Sequence[SampleRef], stage: int, timeout: float) -> list[Any]:
    wanted = [ref.shards[stage] for ref in refs]
    try:
        return list(ray.get(wanted, timeout=timeout))
    except ray.exceptions.RayError:
        return [_get_one(shard, timeout) for shard in wanted]


def _get_one(shard: "ray.ObjectRef[Any]", timeout: float) -> Any:
    try:
        return ray.get(shard, timeout=timeout)
    except ray.exceptions.RayError as error:
        return error
