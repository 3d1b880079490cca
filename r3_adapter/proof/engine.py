"""The rollout engine of the self-test, as the user's own runs: its dtype and arguments, and a back end that exists."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from r3_adapter.errors import R3Error, check_choice
from r3_adapter.machine import version_of
from r3_adapter.proof.evidence import MIN_SEEN, MIN_SEEN_FLOAT32
from r3_adapter.proof.tiny import ENGINE, DType
from r3_adapter.sglang.cpu import has_gpu
from r3_adapter.sglang.perturb import Perturbation
from r3_adapter.sglang.sampling import check_engine
from r3_adapter.sglang.server_arguments import check_server_arguments
from r3_adapter.sglang.settings import EngineSettings

EngineDType = Literal["float32", "bfloat16", "auto"]
PERTURBED_SHARE = 0.2
_OWN = ("model_path", "dtype", "random_seed", "enable_return_routed_experts", "routed_experts_format")
"""Arguments that the self-test gives itself."""


@dataclass(frozen=True)
class ProofEngine:
    """How the engine runs; what is not said here is as SGLang has it: graphs, overlap scheduling, the radix cache.

    dtype: "auto" is the checkpoint's own.
    arguments: more arguments of sglang.Engine.

    Raises:
        R3Error: a dtype that is not known, an argument that the self-test gives itself, one that SGLang does not know,
            or one with which routes or samples would be wrong.
    """

    dtype: EngineDType = "float32"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, EngineDType)
        if own := sorted(self.arguments.keys() & set(_OWN)):
            raise R3Error(f"SGLang's {own[0]} ({self.arguments[own[0]]!r}) is given by the self-test itself")
        arguments = self.settings(Path("model"), seed=0).engine_arguments(gpu=has_gpu())
        check_server_arguments(arguments)
        check_engine(arguments)

    @property
    def checkpoint_dtype(self) -> DType:
        """The dtype of a checkpoint that is written for this engine."""
        return "float32" if self.dtype == "float32" else "bfloat16"

    @property
    def is_exact(self) -> bool:
        """Whether its rounding is known: float32 on a CPU. A GPU's kernels may round float32 through tf32."""
        return self.dtype == "float32" and not self.arguments.get("quantization") and not has_gpu()

    @property
    def min_seen(self) -> float:
        """The least share of misplaced routes that must be seen; none of a quantised engine, whose noise hides most."""
        if self.arguments.get("quantization"):
            return 0.0
        return MIN_SEEN_FLOAT32 if self.dtype == "float32" else MIN_SEEN

    @cached_property
    def chosen(self) -> dict[str, Any]:
        """Arguments in place of SGLang's own choice, where that needs kernels which are not installed."""
        if not has_gpu() or version_of("flashinfer-python") is not None:
            return {}
        wanted = {"sampling_backend": "pytorch"}
        if not _has_flash_attention_3():
            wanted["attention_backend"] = "triton"
        return {name: value for name, value in wanted.items() if name not in self.arguments}

    def to_json(self) -> dict[str, Any]:
        """Return what was asked for, and what was chosen."""
        return {"dtype": self.dtype, "arguments": dict(self.arguments), "chosen": self.chosen}

    def settings(self, checkpoint: Path, *, seed: int) -> EngineSettings:
        """Return the engine's settings, of a tiny model's sizes; the user's arguments win over all."""
        return EngineSettings(
            model_path=str(checkpoint),
            dtype=self.dtype,
            random_seed=seed,
            radix_cache=True,
            **ENGINE,
            perturb=Perturbation(seed=seed, fraction=PERTURBED_SHARE),
            extra={**self.chosen, **self.arguments},
        )


def _has_flash_attention_3() -> bool:
    """Tell whether SGLang's own choice on a Hopper GPU is there."""
    import torch

    package = find_spec("sgl_kernel")
    folders = package.submodule_search_locations if package is not None else None
    return torch.cuda.get_device_capability()[0] == 9 and any(
        Path(folder).glob("flash_ops*.so") for folder in folders or ()
    )
