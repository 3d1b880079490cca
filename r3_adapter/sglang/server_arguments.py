"""Every argument of the pinned SGLang releases: allowed, allowed and tested with routes, or refused and why.

A release with a new argument fails a test until somebody has read what it does to rows, KV slots, experts, tokens and
log-probabilities, and has put it into one of the three.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from r3_adapter.errors import CaptureError
from r3_adapter.sglang.releases import RELEASES, absent, installed_release
from r3_adapter.sglang.sampling import ENGINE_REFUSALS, SAMPLERS
from r3_adapter.sglang.server_argument_names import ALLOWED, TESTED

Refuser = Literal["guard", "adapter"]
_NO = (False,)
_SEVERAL_RANKS = "tokens of a request are on several ranks"
_FOREIGN_KV = "KV that comes back has no experts"
_ADAPTERS = "rows name the version of the base weights, whichever adapter computed them, and the trainer has none"
_SCORED = "it changes the distribution that tokens are scored in"
_PREFILL_CP = ("enable_prefill_cp", "enable_prefill_context_parallel", "enable_dsa_prefill_context_parallel")
_WHOLE_KERNELS = ("enable_nvidia_megakernel", "enable_amd_monokernel")
_REPLAYED = "prefill leaves tokens out of some layers, or computes them twice"
_LOST_RANK = "ranks come and go, and whether a forward pass keeps its rows then is not known"


@dataclass(frozen=True)
class Refusal:
    """Values of an argument that are refused.

    reason: what would go wrong.
    allowed: all other values than these and None are refused.
    refused: where it is given, only these are.
    by: "guard" if the patched engine refuses it too; "adapter" for what spoils a sample but no row, or what the engine
        cannot tell or refuses in another place, which `beside` then says.
    """

    reason: str
    allowed: tuple[Any, ...] = ()
    refused: tuple[Any, ...] | None = None
    by: Refuser = "guard"
    beside: str = ""

    def refuses(self, value: Any) -> bool:
        """Tell whether a value is refused."""
        if value is None:
            return False
        return value in self.refused if self.refused is not None else value not in self.allowed


def _only_here(reason: str, allowed: tuple[Any, ...], beside: str, refused: tuple[Any, ...] | None = None) -> Refusal:
    return Refusal(reason, allowed, refused, "adapter", beside)


_OF_SAMPLES = "rows are right; the sample is not what a trainer can score"
_NO_CAPTURE = "the engine then captures nothing, and says so"

REFUSED: Mapping[str, Refusal] = {
    # Rows of other tokens, or of none.
    "attn_cp_size": Refusal(_SEVERAL_RANKS, (1,)),
    "dcp_size": Refusal(_SEVERAL_RANKS, (1,)),
    "disaggregation_mode": Refusal("a request's rows are on two engines", ("null",)),
    "enable_two_batch_overlap": Refusal("both halves of a batch write the same rows", _NO),
    "speculative_algorithm": Refusal("rows of rejected tokens"),
    "enable_hierarchical_cache": Refusal(_FOREIGN_KV, _NO),
    "enable_unified_cache_external_linker": Refusal(_FOREIGN_KV, _NO),
    "enable_lmcache": Refusal(_FOREIGN_KV, _NO),
    "enable_flexkv": Refusal(_FOREIGN_KV, _NO),
    "enable_hisparse": Refusal(_FOREIGN_KV, _NO),
    "radix_cache_backend": Refusal("it may offload KV"),
    **{
        name: _only_here(_SEVERAL_RANKS, _NO, "attn_cp_size, which it is for, is refused there") for name in _PREFILL_CP
    },
    "enable_kv_cache_sharding": _only_here(
        _SEVERAL_RANKS, _NO, "disaggregation_mode, which it is for, is refused there"
    ),
    "enable_encoder_swa_bounded_replay": Refusal(_REPLAYED, _NO),
    "enable_decoder_swa_bounded_replay": Refusal(_REPLAYED, _NO),
    "enable_unified_memory": Refusal("rows are written at kernel ids and read at virtual ids", _NO),
    "enable_pdmux": Refusal("prefill and decode run at once and write the same rows", _NO),
    "dllm_algorithm": Refusal("a diffusion model computes each KV slot several times"),
    "prefill_only_disable_kv_cache": _only_here("there are no KV slots to keep rows in", _NO, _NO_CAPTURE),
    "decoupled_spec_role": _only_here("rows of rejected tokens", ("null",), "speculative_algorithm is refused there"),
    "uno_lora_path": _only_here("rows of rejected tokens", (), "speculative_algorithm is refused there"),
    "elastic_ep_backend": Refusal(_LOST_RANK),
    "elastic_ep_rejoin": _only_here(_LOST_RANK, _NO, "elastic_ep_backend, which it is for, is refused there"),
    "ep_join_mode": _only_here(_LOST_RANK, (), "elastic_ep_backend, which it is for, is refused there"),
    "moe_dp_size": Refusal("it is not known whether rows stay on the rank of their tokens", (1,)),
    "dwdp_size": Refusal("it is not known whether rows stay on the rank of their tokens", (1,)),
    "moe_a2a_backend": Refusal(
        "ranks choose the experts of a part of a request's tokens", ("none", "deepep", "deepep_v2")
    ),
    # Experts that are not those of the router, or of another model.
    "moe_runner_backend": Refusal(
        "it chooses the experts itself",
        refused=("triton_kernel", "flashinfer_trtllm", "experimental_sgl_trtllm", "flashinfer_mxfp4"),
    ),
    **{name: Refusal("its kernels choose the experts themselves", _NO) for name in _WHOLE_KERNELS},
    "kt_max_deferred_experts_per_token": _only_here("experts' outputs reach a later layer", (0,), _OF_SAMPLES),
    "model_impl": _only_here(
        "its MoE layers have no router of SGLang's", (), _NO_CAPTURE, ("transformers", "mindspore")
    ),
    "json_model_override_args": _only_here(
        "the engine's model would not be that of the checkpoint's configuration", ("", "{}", {}), _OF_SAMPLES
    ),
    "forward_hooks": _only_here("hooks change what modules compute", ([],), _OF_SAMPLES),
    "enable_lora": Refusal(_ADAPTERS, _NO),
    "lora_paths": _only_here(_ADAPTERS, ([], {}, ""), "it sets enable_lora, which is refused there"),
    # Nothing is sampled.
    "is_embedding": _only_here("an embedding model samples no tokens", _NO, _OF_SAMPLES),
    "encoder_only": _only_here("an encoder samples no tokens", _NO, _OF_SAMPLES),
    "enable_mis": _only_here("items of one request share positions, and none is sampled", _NO, _OF_SAMPLES),
    # Log-probabilities of another distribution than the trainer's.
    "enable_strict_thinking": _only_here(_SCORED, _NO, _OF_SAMPLES),
    "enable_watermark": _only_here(
        "tokens are drawn from another distribution than they are scored in", _NO, _OF_SAMPLES
    ),
    "sampling_backend": _only_here(
        "what a sampler of your own scores is not known", tuple(each for each in SAMPLERS if each), _OF_SAMPLES
    ),
    **{name: _only_here(reason, (False, "", "{}"), _OF_SAMPLES) for name, reason in ENGINE_REFUSALS.items()},
}
"""By name. What is a part of something refused, such as hicache_ratio, has no effect without it and is allowed."""


def known_arguments(release: str | None = None) -> frozenset[str]:
    """Return the names of all arguments that are classified.

    release: leave out those that it does not have; None, or a release that is not known, for those of all.
    """
    return (ALLOWED | TESTED | REFUSED.keys()) - absent("ServerArgs", release)


def refused_arguments(arguments: Mapping[str, Any], release: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield the name of each argument that is refused, and why, with both operands.

    release: of SGLang; None for the one that is installed here, if any.
    """
    release = release or installed_release()
    known = known_arguments(release)
    for name, value in arguments.items():
        if name not in known:
            yield name, f"{name!r} is no argument of SGLang {release or ' or '.join(RELEASES)}{_hint(name, known)}"
        elif (refusal := REFUSED.get(name)) is not None and refusal.refuses(value):
            yield name, f"{value!r} != {_wanted(refusal)}: {refusal.reason}"


def check_server_arguments(arguments: Mapping[str, Any], release: str | None = None) -> None:
    """Refuse arguments of SGLang with which routes or samples would be wrong, before anything starts.

    release: as in refused_arguments.

    Raises:
        CaptureError: Names the first one, with both operands.
    """
    for name, why in refused_arguments(arguments, release):
        raise CaptureError(f"SGLang's argument {why}" if why.startswith(repr(name)) else f"SGLang's {name} {why}")


def _hint(name: str, known: frozenset[str]) -> str:
    if having := [each for each in RELEASES if name in known_arguments(each)]:
        return f"; {' and '.join(having)} {'has' if len(having) == 1 else 'have'} it"
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _wanted(refusal: Refusal) -> str:
    if refusal.refused is not None:
        return "another than " + " or ".join(map(repr, refusal.refused))
    return " or ".join(repr(each) for each in (*(each for each in refusal.allowed if each or each in _NO), None))
