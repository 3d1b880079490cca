"""Settings of a rollout engine, and their JSON form."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from r3_adapter.errors import CaptureError, check_choice, check_whole, show
from r3_adapter.sglang.perturb import Perturbation
from r3_adapter.watchdog import MEMORY

Format = Literal["safetensors", "flat", "exact-flat"]


@dataclass(frozen=True)
class EngineSettings:
    """How a rollout engine is started.

    tp_size, pp_size: tensor and pipeline parallel sizes of the engine.
    radix_cache: share the KV rows of common prefixes between requests.
    routed_experts_format: "safetensors" and "exact-flat" need the patched SGLang. "flat" is SGLang's own form, and
        "exact-flat" is the same with the rows that "safetensors" has; see docs/capture.md for what it cannot say.
    shared_memory: hand the routes over in files below /dev/shm; needs format "safetensors". None: where that is the
        format, unless `extra` spreads the engine over hosts or names a folder.
    max_total_tokens: size of the KV cache in tokens; None leaves it to SGLang, which takes most of the memory.
    max_running_requests: requests that are computed at once; None leaves it to SGLang.
    weight_version: the engine's name for the checkpoint's weights, which rows carry.
    overlap: overlap scheduling; None for off without a GPU, where it gains nothing, and on with one.
    perturb: select random experts in some routes; for proofs.
    extra: more arguments of sglang.Engine, which win over these.

    Raises:
        CaptureError: a format that is not known, or a value of another kind.
    """

    model_path: str
    dtype: str = "auto"
    tp_size: int = 1
    pp_size: int = 1
    radix_cache: bool = False
    routed_experts_format: Format = "safetensors"
    random_seed: int = 0
    context_length: int | None = None
    max_total_tokens: int | None = None
    max_running_requests: int | None = None
    weight_version: str = "default"
    overlap: bool | None = None
    log_level: str = "warning"
    perturb: Perturbation | None = None
    shared_memory: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("routed_experts_format", self.routed_experts_format, Format, CaptureError)
        if not isinstance(self.model_path, str | os.PathLike) or not str(self.model_path):
            raise CaptureError(f"model_path {show(self.model_path)} is no path of a folder")
        # A path would not go into the settings' file.
        object.__setattr__(self, "model_path", str(self.model_path))
        if not isinstance(self.perturb, Perturbation | None):
            raise CaptureError(
                f"perturb {show(self.perturb)} is no Perturbation; Perturbation.parse reads 'SEED:FRACTION'"
            )
        if not isinstance(self.extra, Mapping):
            raise CaptureError(f"extra {show(self.extra)} is no mapping of SGLang's arguments")
        for name, kind in (("radix_cache", bool), ("shared_memory", bool | None), ("overlap", bool | None)):
            if not isinstance(getattr(self, name), kind):
                raise CaptureError(f"{name} {show(getattr(self, name))} is neither True nor False")
        for name in ("dtype", "weight_version", "log_level"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise CaptureError(f"{name} {show(getattr(self, name))} is no word")
        if self.shared_memory and self.is_flat:
            raise CaptureError(
                f"shared_memory with routed_experts_format {self.routed_experts_format!r}: only 'safetensors' has it"
            )
        check_whole("random_seed", self.random_seed, error=CaptureError)
        for name in ("tp_size", "pp_size", "context_length", "max_total_tokens", "max_running_requests"):
            value = getattr(self, name)
            if value is not None or name in ("tp_size", "pp_size"):
                check_whole(name, value, 1, error=CaptureError)

    @property
    def is_flat(self) -> bool:
        """Whether replies have int32 ids of all decoder layers, and nothing that says what they belong to."""
        return self.routed_experts_format != "safetensors"

    @property
    def uses_shared_memory(self) -> bool:
        """Whether routes are handed over in files: without a copy of them in the messages of the engine's processes."""
        if self.shared_memory is not None:
            return self.shared_memory
        is_one_host = self.extra.get("nnodes", 1) == 1 and "routed_experts_dir" not in self.extra
        return not self.is_flat and is_one_host and MEMORY.is_dir()

    def engine_arguments(self, *, gpu: bool) -> dict[str, Any]:
        """Return the keyword arguments of sglang.Engine."""
        arguments: dict[str, Any] = {
            "model_path": self.model_path,
            "dtype": self.dtype,
            "tp_size": self.tp_size,
            "pp_size": self.pp_size,
            "disable_radix_cache": not self.radix_cache,
            "random_seed": self.random_seed,
            "context_length": self.context_length,
            "max_total_tokens": self.max_total_tokens,
            "max_running_requests": self.max_running_requests,
            "skip_tokenizer_init": True,
            "enable_return_routed_experts": True,
            "log_level": self.log_level,
            "weight_version": self.weight_version,
        }
        if self.routed_experts_format != "flat":
            # An unpatched SGLang does not know the argument.
            arguments["routed_experts_format"] = self.routed_experts_format
        if not gpu:
            arguments |= {"device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch"}
            # A scheduler that polls would take a core from the trainer that shares the machine.
            arguments |= {"chunked_prefill_size": 256, "sleep_on_idle": True, "disable_cuda_graph": True}
        arguments["disable_overlap_schedule"] = not (gpu if self.overlap is None else self.overlap)
        arguments |= self.extra
        if not gpu:
            # What other processes take while the weights are loaded counts against this share of the memory. It only
            # has to be small where nothing else says how large the KV cache may be.
            arguments.setdefault("mem_fraction_static", 0.9 if arguments["max_total_tokens"] else 0.1)
        return arguments

    def to_json(self) -> str:
        """Return the form that from_json reads."""
        return json.dumps({**asdict(self), "perturb": self.perturb and str(self.perturb)})

    @classmethod
    def from_json(cls, text: str) -> "EngineSettings":
        """Read what to_json wrote.

        Raises:
            CaptureError: It is something else.
        """
        try:
            values = json.loads(text)
            perturb = values.pop("perturb")
            return cls(**values, perturb=None if perturb is None else Perturbation.parse(perturb))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CaptureError(f"engine settings cannot be read: {error}") from error
