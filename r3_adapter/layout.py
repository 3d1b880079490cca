"""Parallel layouts as Megatron-core lays them out: sizes, rank coordinates, and the tokens of a rank's MoE layers.

N: segments; T: tokens of a rank.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import LayoutError, check_choice, check_whole, show

QkvFormat = Literal["sbhd", "thd"]
CpCut = Literal["zigzag", "contiguous"]
"""How context parallelism cuts: a chunk from each end of every sample, as Megatron does, or one interval a rank."""


class RankCoords(NamedTuple):
    """A rank's place in the dense grid (tp, cp, dp, pp) and in the expert grid (etp, ep, edp, pp)."""

    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    etp_rank: int
    ep_rank: int
    edp_rank: int


@dataclass(frozen=True)
class ParallelLayout:
    """The sizes of a trainer's parallel dimensions; vpp is the number of model chunks of a pipeline stage.

    Source: megatron/core/parallel_state.py@0.16.1:initialize_model_parallel, order "tp-cp-ep-dp-pp".

    Raises:
        LayoutError: a size that is no whole number or below 1, an expert grid that does not divide the world, or chunks
            without a pipeline.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp"):
            size = check_whole(name, getattr(self, name), error=LayoutError)
            object.__setattr__(self, name, size)
            if size < 1:
                raise LayoutError(f"{name} ({show(size)}) < 1 in {self}")
        if self.vpp > 1 and self.pp == 1:
            raise LayoutError(f"vpp ({self.vpp}) > 1, but pp is 1 in {self}")
        if self.stage_size % self.expert_size:
            raise LayoutError(
                f"etp * ep ({self.expert_size}) does not divide tp * cp * dp ({self.stage_size}) in {self}"
            )

    @classmethod
    def smallest(
        cls, *, tp: int = 1, pp: int = 1, vpp: int = 1, cp: int = 1, ep: int = 1, etp: int | None = None, dp: int = 1
    ) -> "ParallelLayout":
        """Return the layout of the smallest world that the dense and the expert grid both divide.

        dp: the least number of copies of the dense layers; a multiple of it may be needed.

        Raises:
            LayoutError: a size that is no whole number or below 1, or chunks without a pipeline.
        """
        sizes = {"tp": tp, "cp": cp, "dp": dp, "etp": tp if etp is None else etp, "ep": ep}
        tp, cp, dp, expert_tp, ep = (check_whole(name, size, error=LayoutError) for name, size in sizes.items())
        for name, size in sizes.items():
            if size < 1:
                raise LayoutError(f"{name} ({size}) < 1: every size of a layout is at least 1")
        dense, expert = tp * cp * dp, expert_tp * ep
        return cls(tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp, dp=dp * math.lcm(dense, expert) // dense)

    @property
    def stage_size(self) -> int:
        """Number of ranks of a pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def expert_size(self) -> int:
        """Number of ranks that hold one copy of a stage's experts."""
        assert self.etp is not None
        return self.etp * self.ep

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.stage_size * self.pp

    def coords(self, rank: int) -> RankCoords:
        """Return the coordinates of a global rank.

        Raises:
            LayoutError: rank that is no whole number or outside the world.
        """
        rank = check_whole("rank", rank, error=LayoutError)
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank ({rank}) outside world of {self.world_size} in {self}")
        assert self.etp is not None
        pp_rank, place = divmod(rank, self.stage_size)
        return RankCoords(
            tp_rank=place % self.tp,
            cp_rank=place // self.tp % self.cp,
            dp_rank=place // (self.tp * self.cp),
            pp_rank=pp_rank,
            etp_rank=place % self.etp,
            ep_rank=place // self.etp % self.ep,
            edp_rank=place // self.expert_size,
        )


@dataclass(frozen=True)
class Packing:
    """How the samples of a micro-batch lie in its tokens; made by `padded` or `packed`.

    qkv_format: "sbhd", every sample padded to one sequence length, rows in Megatron's order: row r is token r // b of
        sample r % b, of b samples; or "thd", the samples one after the other in a batch of 1.
    padded_lengths: of each sample. Padding at the end of a stream belongs to the padded length of the last sample, or
        is a sample of no tokens.
    cp_cut: "zigzag", a context parallel rank has two of 2 * cp chunks of each sample; or "contiguous", one of cp equal
        intervals: of each sample's sequence in "sbhd", of the whole stream in "thd", where a sample may lie on several
        ranks.

    Raises:
        LayoutError: another format or cut, no samples, a padded length that is no whole number or below 0, or padded
            lengths that differ in "sbhd".
    """

    qkv_format: QkvFormat
    padded_lengths: tuple[int, ...]
    cp_cut: CpCut = "zigzag"

    def __post_init__(self) -> None:
        check_choice("qkv_format", self.qkv_format, QkvFormat, LayoutError)
        check_choice("cp_cut", self.cp_cut, CpCut, LayoutError)
        object.__setattr__(self, "padded_lengths", tuple(_whole_numbers("padded_lengths", self.padded_lengths)))
        if not self.padded_lengths:
            raise LayoutError(f"a {self.qkv_format} micro-batch without samples")
        for sample, padded_length in enumerate(self.padded_lengths):
            if padded_length < 0:
                raise LayoutError(f"padded length ({padded_length}) of sample {sample} < 0")
            if self.qkv_format == "sbhd" and padded_length != self.padded_lengths[0]:
                raise LayoutError(
                    f"padded length ({padded_length}) of sample {sample} != {self.padded_lengths[0]} of sample 0 in "
                    "sbhd"
                )

    @classmethod
    def padded(cls, num_samples: int, seq_length: int, *, cp_cut: CpCut = "zigzag") -> "Packing":
        """Return the packing "sbhd" of samples that are padded to one length."""
        length = check_whole("seq_length", seq_length, error=LayoutError)
        return cls("sbhd", (length,) * check_whole("num_samples", num_samples, error=LayoutError), cp_cut)

    @classmethod
    def packed(
        cls, cu_seqlens_padded: Sequence[int] | npt.NDArray[np.integer], *, cp_cut: CpCut = "zigzag"
    ) -> "Packing":
        """Return the packing "thd" of samples that begin and end at cumulated padded lengths.

        cu_seqlens_padded: [num_samples + 1] integers from 0 on, that do not decrease.

        Raises:
            LayoutError: lengths that are no whole numbers, do not begin with 0, or decrease.
        """
        bounds = _whole_numbers("cu_seqlens_padded", cu_seqlens_padded)
        if not bounds or bounds[0] != 0:
            raise LayoutError(f"cu_seqlens_padded {bounds} does not begin with 0")
        return cls("thd", tuple(stop - start for start, stop in pairwise(bounds)), cp_cut)

    @property
    def num_samples(self) -> int:
        """Number of samples of the micro-batch."""
        return len(self.padded_lengths)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the micro-batch, padding included."""
        return sum(self.padded_lengths)


def _whole_numbers(name: str, numbers: Iterable[object]) -> list[int]:
    try:
        found = enumerate(numbers)
    except TypeError:
        raise LayoutError(f"{name} ({show(numbers)}) are not whole numbers") from None
    return [check_whole(f"{name}[{at}]", number, error=LayoutError) for at, number in found]


def local_num_tokens(packing: Packing, layout: ParallelLayout) -> int:
    """Return T, the tokens of a rank's MoE layers.

    Raises:
        LayoutError: a sample that context parallelism, or rows that sequence parallelism does not divide.
    """
    cp, tp = layout.cp, layout.tp
    length = packing.padded_lengths[0] if packing.qkv_format == "sbhd" else packing.num_tokens
    if packing.cp_cut == "contiguous" and length % cp:
        raise LayoutError(f"cp ({cp}) does not divide the {length} sequence rows of a micro-batch in {_form(packing)}")
    if packing.cp_cut == "zigzag" and cp > 1:
        for sample, padded_length in enumerate(packing.padded_lengths):
            if padded_length % (2 * cp):
                raise LayoutError(
                    f"2 * cp ({2 * cp}) does not divide padded length ({padded_length}) of sample {sample}"
                )
    rows = length // cp
    if rows % tp:
        raise LayoutError(f"tp ({tp}) does not divide the {rows} sequence rows of a cp rank in {_form(packing)}")
    return packing.num_tokens // (cp * tp)


def _form(packing: Packing) -> str:
    return packing.qkv_format if packing.cp_cut == "zigzag" else f"{packing.qkv_format}, cut contiguously"


def local_segments(packing: Packing, layout: ParallelLayout, coords: RankCoords) -> npt.NDArray[np.int64]:
    """Return which tokens of which samples a rank's MoE layers see, and at which local rows.

    Context parallelism's zigzag cuts each sample into 2 * cp chunks, of which a rank has chunks cp_rank and
    2 * cp - 1 - cp_rank; its contiguous cut gives a rank interval cp_rank of cp. Sequence parallelism, which MoE
    training always uses with tp > 1, then cuts the rank's sequence rows into tp equal parts.

    Returns:
        [N, 5] int64, C-contiguous; each line is sample, pos, length, row, stride: the tokens pos to pos + length of
        the sample are at the local rows row, row + stride, and so on. Together they fill the rows 0 to T - 1 once.

    Raises:
        LayoutError: sizes that do not divide.

    Source:
        megatron/core/utils.py@0.16.1:get_batch_on_this_cp_rank and get_thd_batch_on_this_cp_rank;
        megatron/core/tensor_parallel/mappings.py@0.16.1:_split_along_first_dim.
    """
    part = local_num_tokens(packing, layout)
    samples, starts, lengths = _cp_pieces(packing, layout.cp, coords.cp_rank)
    if packing.qkv_format == "sbhd":
        # A sequence row holds one token of each sample: every sample is cut alike and the samples interleave.
        lines, stride, column = lengths.reshape(packing.num_samples, -1), packing.num_samples, samples
    else:
        lines, stride, column = lengths.reshape(1, -1), 1, np.zeros_like(samples)
    rows = (np.cumsum(lines, axis=1) - lines).ravel()
    low, high = coords.tp_rank * part // stride, (coords.tp_rank + 1) * part // stride
    first, last = np.clip(rows, low, high), np.clip(rows + lengths, low, high)
    columns = (
        samples,
        starts + first - rows,
        last - first,
        (first - low) * stride + column,
        np.full_like(rows, stride),
    )
    return np.ascontiguousarray(np.stack(columns, axis=1)[last > first])


def _cp_pieces(
    packing: Packing, cp: int, cp_rank: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return sample, first position and length of a rank's pieces, in the order of its rows; some of length 0."""
    samples = np.arange(packing.num_samples, dtype=np.int64)
    padded_lengths = np.array(packing.padded_lengths, dtype=np.int64)
    if cp == 1:
        return samples, np.zeros_like(padded_lengths), padded_lengths
    if packing.cp_cut == "contiguous":
        # First position of a sample: 0 if each sample is cut by itself, else its place in the stream.
        begins = (
            np.zeros_like(padded_lengths)
            if packing.qkv_format == "sbhd"
            else np.cumsum(padded_lengths) - padded_lengths
        )
        share = (packing.padded_lengths[0] if packing.qkv_format == "sbhd" else packing.num_tokens) // cp
        first = np.clip(cp_rank * share - begins, 0, padded_lengths)
        return samples, first, np.clip((cp_rank + 1) * share - begins, 0, padded_lengths) - first
    chunk = np.repeat(padded_lengths // (2 * cp), 2)
    which = np.tile(np.array([cp_rank, 2 * cp - 1 - cp_rank], dtype=np.int64), packing.num_samples)
    return np.repeat(samples, 2), which * chunk, chunk
