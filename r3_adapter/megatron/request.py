"""What the trainer's processes are asked to do."""

from dataclasses import dataclass

MODES = ("live", "replay")


@dataclass(frozen=True)
class ScoreRequest:
    """Samples to score; its JSON form is the worker's first argument.

    checkpoint, samples, out: folders; rendezvous: a file that does not exist yet.
    layout: the arguments of ParallelLayout.
    micro_batch_size: samples in a forward pass of a data-parallel rank.
    """

    checkpoint: str
    samples: str
    out: str
    rendezvous: str
    layout: dict[str, int]
    dispatcher: str
    micro_batch_size: int
