"""Run Megatron-core on a machine without a GPU: process groups on gloo, tensors in main memory.

Megatron-core takes CUDA for granted in a few places that compute nothing. Each function below answers one of them and
says which; they are of all pins unless it names some. Nothing here changes what Megatron computes, and nothing here is
loaded when a GPU is present.
"""

# Replacing what torch defines is what this module is for.
# mypy: disable-error-code="assignment,method-assign,attr-defined,misc,return-value"

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from packaging.version import Version

from r3_adapter.errors import ReplayError
from r3_adapter.megatron import kernels

_CPU = torch.device("cpu")


def install() -> None:
    """Make Megatron-core run on the CPU in this process; call it before importing megatron.

    Raises:
        ReplayError: a GPU is present; Megatron needs no help there.
    """
    if torch.cuda.is_available():
        raise ReplayError(f"CPU support asked for, but {torch.cuda.device_count()} CUDA devices are present")
    if getattr(torch.cuda, "_r3_cpu_support", False):
        return
    for answer in (
        _quiet,
        _eager,
        _device,
        _factories,
        _moves,
        _streams,
        _tensor_type,
        _rng_state,
        _uneven_collectives,
    ):
        answer()
    for answer in (
        _rng_tracker,
        _missing_te_gemm,
        _split_sizes,
        _sequence_parallel_norm,
        _inference_layers,
        _gated_delta_net,
        _latent_projection,
    ):
        answer()
    torch.cuda._r3_cpu_support = True


def install_training() -> None:
    """Make megatron.training, which wheels from 0.17 on have, run on the CPU too; call it before importing it.

    Raises:
        ReplayError: as for `install`, which it calls.
    """
    install()
    for answer in (_barrier, _no_makefile, _architecture, _initialization):
        answer()


def _quiet() -> None:
    """That kernels for a GPU are missing is no news where there is none; Megatron says it of each at import."""
    for says in (".*(Transformer Engine|Apex).* not installed", "full scope is deprecated"):
        warnings.filterwarnings("ignore", message=says, category=UserWarning)


def _eager() -> None:
    """Megatron's jit_fuser is torch.compile: correct on a CPU, but compiling takes longer than a test runs."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch._dynamo.config.disable = True


def _device() -> None:
    """Megatron allocates on torch.cuda.current_device() and waits with torch.cuda.synchronize()."""
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.synchronize = lambda device=None: None


def _factories() -> None:
    """optimizer.py, clip_grads.py, schedules.py, utils.py and megatron.training allocate with a literal device="cuda".

    rope_utils.py pins what it moves to the device under context parallelism.
    """

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return make

    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "rand"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _moves() -> None:
    """language_module.py, mappings.py and the pipeline schedules move with .cuda()."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


class _Event:
    """A point in a stream; with one stream, always reached."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...


class _Stream:
    """The one stream that a CPU has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> _Event:
        return _Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = object.__hash__


def _streams() -> None:
    """The all-to-all dispatcher copies its split sizes on a side stream, and schedule plans keep tensors for one."""

    @contextlib.contextmanager
    def stream(_: object) -> Iterator[None]:
        yield

    only = _Stream()
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
    torch.cuda.current_stream = lambda device=None: only
    torch.cuda.stream = stream
    torch.Tensor.record_stream = lambda self, stream: None
    # Before 0.18 the nodes of a plan mark their ranges for a profiler, which builds of torch without CUDA cannot.
    torch.cuda.nvtx.range_push = lambda message: 0
    torch.cuda.nvtx.range_pop = lambda: 0


def _tensor_type() -> None:
    """clip_grads.py looks for gradients whose type() is "torch.cuda.FloatTensor"."""
    plain = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = cuda_type


def _rng_state() -> None:
    """Checkpointing and seeding keep the state of the device's generator: here the CPU's."""
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.default_generator.manual_seed


def _uneven_collectives() -> None:
    """The all-to-all dispatcher gathers and scatters uneven parts over expert-tensor ranks; gloo wants even ones."""
    gather, scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    def padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_zeros((rows - len(tensor), *tensor.shape[1:]))])

    def all_gather(outputs: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes = [len(output) if output.dim() else 1 for output in outputs]
        if len(set(sizes)) == 1:
            return gather(outputs, tensor, *args, **kwargs)
        even = [tensor.new_empty((max(sizes), *tensor.shape[1:])) for _ in sizes]
        gather(even, padded(tensor, max(sizes)), *args, **kwargs)
        for output, part in zip(outputs, even, strict=True):
            output.copy_(part[: len(output)])
        return None

    def reduce_scatter(output: torch.Tensor, inputs: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        sizes = [len(part) if part.dim() else 1 for part in inputs]
        if len(set(sizes)) == 1:
            return scatter(output, inputs, *args, **kwargs)
        even = output.new_empty((max(sizes), *output.shape[1:]))
        scatter(even, [padded(part, max(sizes)) for part in inputs], *args, **kwargs)
        output.copy_(even[: len(output)])
        return None

    torch.distributed.all_gather, torch.distributed.reduce_scatter = all_gather, reduce_scatter


def _rng_tracker() -> None:
    """tensor_parallel.random forks the device's generator, and warns when the CPU's moved inside a fork."""
    import megatron.core.tensor_parallel.random as tp_random

    tp_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    tp_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger(tp_random.__name__).addFilter(lambda record: "CPU RNG state" not in record.getMessage())


def _missing_te_gemm() -> None:
    """moe_utils of 0.16 reads te_general_gemm, which it defines only with TransformerEngine."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _split_sizes() -> None:
    """The all-to-all dispatcher turns split sizes into numpy only when they leave a GPU; gloo wants numbers."""
    from megatron.core.transformer.moe import token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.cpu().numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _sequence_parallel_norm() -> None:
    """WrappedTorchNorm refuses sequence_parallel, and MoE training with TP refuses to go without it.

    The norm is the same; its weight is marked, as TransformerEngine's is, so that its gradient is reduced over TP.
    It refuses weights around zero too, which families with gated delta nets have.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def new(_: type, config: Any, hidden_size: int, eps: float = 1e-5, **__: Any) -> torch.nn.Module:
        norm = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        if config.layernorm_zero_centered_gamma:
            if norm is not torch.nn.RMSNorm:
                raise ReplayError(f"layernorm_zero_centered_gamma with {config.normalization} does not work on a CPU")
            norm = kernels.ZeroCenteredRMSNorm
        module = norm(normalized_shape=hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return module

    WrappedTorchNorm.__new__ = staticmethod(new)


def _inference_layers() -> None:
    """From 0.20 on a layer of multi-token prediction asks whether a projection is of a class of TransformerEngine's."""
    from megatron.core import __version__

    if Version(__version__) < Version("0.20.0.dev0"):
        return
    from megatron.core.transformer import multi_token_prediction

    multi_token_prediction.is_inference_column_parallel_linear = lambda module: False


def _gated_delta_net() -> None:
    """A gated delta net wants fla; up to 0.18 it uses only the norm of queries and keys with deterministic_mode.

    Its convolution and its rule are torch's then, so a model on the CPU has to have that option. Later ones get both
    in torch without it, and for packed sequences too.
    """
    import megatron.core.ssm.gated_delta_net as package

    # A package since 0.19.
    modules: list[Any] = [
        module for name in ("common", "gdn") if (module := sys.modules.get(f"{package.__name__}.{name}")) is not None
    ] or [package]
    if modules[0].HAVE_FLA:
        return
    modules[0].HAVE_FLA, modules[0].l2norm = True, kernels.l2norm
    if modules[0] is not package:
        rule = kernels.by_sequence(modules[0].torch_chunk_gated_delta_rule)
        for module in modules:
            module.causal_conv1d, module.chunk_gated_delta_rule = kernels.causal_conv1d, rule


def _latent_projection() -> None:
    """Latent experts are between two layers of TransformerEngine's, which each tensor-parallel rank has whole."""
    from megatron.core.transformer.moe import moe_layer

    if hasattr(moe_layer, "HAVE_TE") and not moe_layer.HAVE_TE:
        moe_layer.HAVE_TE, moe_layer.TELinear = True, kernels.DuplicatedLinear


def install_hybrid() -> None:
    """Make the layers of Megatron's HybridModel run on the CPU too; call it before building one.

    A mixer of Mamba wants mamba-ssm and causal-conv1d, the block TransformerEngine's last norm.

    Raises:
        ReplayError: as for `install`, which it calls.
    """
    install()
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.ssm import mamba_mixer
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    if not mamba_mixer.HAVE_MAMBA_SSM:
        mamba_mixer.HAVE_MAMBA_SSM, mamba_mixer.ExtendedRMSNorm = True, kernels.GroupedRMSNorm
        mamba_mixer.mamba_split_conv1d_scan_combined = kernels.mamba_split_conv1d_scan_combined
        mamba_mixer._check_mamba_sequence_packing_support = lambda for_inference_not_training=True: (True, None)
    hybrid_block.TENorm = WrappedTorchNorm


def _barrier() -> None:
    """Timers and checkpoints wait with barrier(device_ids=...), which gloo refuses."""
    barrier = torch.distributed.barrier
    torch.distributed.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)


def _no_makefile() -> None:
    """initialize.py compiles helpers of datasets that the wheel has compiled already, and without a Makefile exits."""
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None


def _architecture() -> None:
    """arguments.py asks whether the GPU is older than Blackwell, which would want one hardware queue."""
    from megatron.training import arguments

    arguments.get_device_arch_version = lambda: 10


def _initialization() -> None:
    """initialize_megatron asserts that CUDA is there, sets its device, and makes groups only if it counts devices.

    The answers hold for that call alone: whatever else asks whether there is a GPU hears the truth.
    """
    from megatron.training import training

    initialize = training.initialize_megatron

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        answers = {"is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda device: None}
        truth = {name: getattr(torch.cuda, name) for name in answers}
        try:
            for name, answer in answers.items():
                setattr(torch.cuda, name, answer)
            return initialize(*args, **kwargs)
        finally:
            for name, answer in truth.items():
                setattr(torch.cuda, name, answer)

    training.initialize_megatron = on_cpu
