"""Which decoder layers the chunks of a pipeline stage have."""

import re
from itertools import pairwise

from r3_adapter.errors import LayoutError
from r3_adapter.layout import ParallelLayout

Stages = tuple[tuple[tuple[int, ...], ...], ...]
"""By pipeline stage and model chunk: global decoder layers from 0."""

_REPEATED = re.compile(r"(\([^()]*\)|[^()*])\*(\d+)")
_MOST_DIGITS, _LONGEST = 4, 1 << 16


def even_stages(num_layers: int, layout: ParallelLayout) -> Stages:
    """Share layers out evenly, chunk after chunk over all stages.

    Raises:
        LayoutError: pp * vpp does not divide the layers.

    Source: megatron/core/transformer/transformer_layer.py@0.16.1:get_transformer_layer_offset
    """
    chunks = layout.pp * layout.vpp
    if num_layers % chunks:
        raise LayoutError(
            f"pp * vpp ({layout.pp} * {layout.vpp}) does not divide num_layers ({num_layers}); "
            "say which layers each stage has with --pipeline-model-parallel-layout"
        )
    size = num_layers // chunks
    return _by_stage([tuple(range(at * size, (at + 1) * size)) for at in range(chunks)], layout)


def stages_of(text: str, num_layers: int, layout: ParallelLayout) -> Stages:
    """Return what Megatron's --pipeline-model-parallel-layout says, such as "Et*15|t*16|t*16|t*14L".

    Raises:
        LayoutError: a string that is none, or of another number of stages or layers.

    Source: megatron/core/transformer/pipeline_parallel_layer_layout.py@0.16.1
    """
    plain, count = text.replace(",", ""), 1
    while count:
        if (most := max((len(digits) for _, digits in _REPEATED.findall(plain)), default=0)) > _MOST_DIGITS:
            raise LayoutError(f"pipeline layout {text[:60]!r}: a number of {most} digits > num_layers ({num_layers})")
        plain, count = _REPEATED.subn(lambda found: found[1].strip("()") * int(found[2]), plain)
        if len(plain) > _LONGEST:
            raise LayoutError(
                f"pipeline layout {text[:60]!r}: {len(plain)} letters, far more than layers ({num_layers})"
            )
    stages = plain.split("|")
    if unknown := set(plain) - set("EtL|"):
        raise LayoutError(f"pipeline layout {text!r}: {''.join(sorted(unknown))!r} is none of E, t, L, | and *N")
    if len(stages) != layout.pp * layout.vpp:
        raise LayoutError(f"pipeline layout {text!r}: {len(stages)} parts != pp * vpp ({layout.pp} * {layout.vpp})")
    letters = "".join(stages)
    if letters.count("t") != num_layers:
        raise LayoutError(f"pipeline layout {text!r}: {letters.count('t')} layers != num_layers ({num_layers})")
    if not re.fullmatch("Et*L", letters):
        raise LayoutError(f"pipeline layout {text!r}: {letters[:1]!r} and {letters[-1:]!r} != 'E' first and 'L' last")
    at, chunks = 0, []
    for stage in stages:
        chunks.append(tuple(range(at, at + stage.count("t"))))
        at += stage.count("t")
    return _by_stage(chunks, layout)


def engine_stages(num_layers: int, pp: int) -> list[range]:
    """Return the decoder layers of each pipeline stage of an engine; the last ones have the layers that are left over.

    Source: sglang@0.5.20 srt/distributed/utils.py:get_pp_indices
    """
    starts = [stage * (num_layers // pp) + max(0, stage - pp + num_layers % pp) for stage in range(pp + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _by_stage(chunks: list[tuple[int, ...]], layout: ParallelLayout) -> Stages:
    return tuple(tuple(chunks[pp_rank :: layout.pp]) for pp_rank in range(layout.pp))
