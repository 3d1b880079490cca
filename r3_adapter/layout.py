"""Parallel layouts as Megatron-core lays them out: sizes, rank coordinates, and the tokens that a rank's MoE layers see.

S: sequence length.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from r3_adapter.errors import LayoutError


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
    """The sizes of a trainer's parallel dimensions.

    Source: megatron/core/parallel_state.py@0.16.1:initialize_model_parallel, order "tp-cp-ep-dp-pp".

    Raises:
        LayoutError: a size below 1, or an expert grid that does not divide the world.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        for name in ("tp", "pp", "cp", "ep", "etp", "dp"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} ({getattr(self, name)}) < 1 in {self}")
        if self.stage_size % self.expert_size:
            raise LayoutError(
                f"etp * ep ({self.expert_size}) does not divide tp * cp * dp ({self.stage_size}) in {self}"
            )

    @classmethod
    def smallest(cls, *, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, etp: int | None = None, dp: int = 1) -> "ParallelLayout":
        """Return the layout of the smallest world that the dense and the expert grid both divide."""
        dense, expert = tp * cp * dp, (tp if etp is None else etp) * ep
        if min(dense, expert) < 1:
            raise LayoutError(f"tp * cp * dp ({dense}) and etp * ep ({expert}) must both be at least 1")
        return cls(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, dp=dp * math.lcm(dense, expert) // dense)

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
        return self.stage_size * self.pp

    def coords(self, rank: int) -> RankCoords:
        """Return the coordinates of a global rank.

        Raises:
            LayoutError: rank outside the world.
        """
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
