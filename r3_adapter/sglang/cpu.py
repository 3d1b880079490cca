"""What lets SGLang run without a GPU: an environment, stand-ins to import, a host allocator. With a GPU: nothing."""

import importlib
import os
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

STUBS = Path(__file__).resolve().parent / "cpu_stubs"


def has_gpu() -> bool:
    """Tell whether torch can use a CUDA GPU here."""
    import torch

    return torch.cuda.is_available()


def cpu_environment() -> dict[str, str]:
    """Return the variables with which a new process can run SGLang without a GPU; {} where there is one.

    A variable that is set already keeps its value. Stand-ins for sgl_kernel and torchvision go to the front of
    PYTHONPATH, and only for the ones that are not installed.
    """
    if has_gpu():
        return {}
    wanted = {
        # Without it SGLang looks for an accelerator, and gives up.
        "SGLANG_USE_CPU_ENGINE": "1",
        # Which cores each rank's threads are bound to; SGLang's own guess needs several NUMA nodes.
        "SGLANG_CPU_OMP_THREADS_BIND": "0",
        # Threads that wait for each other's small pieces of work spin: on shared cores that is most of the time.
        "OMP_NUM_THREADS": "1",
        # gloo would bind to the interface of the host name.
        "GLOO_SOCKET_IFNAME": "lo",
    }
    found = os.environ.get("PYTHONPATH")
    paths = [*_stub_paths(), *([found] if found else [])]
    variables = {name: os.environ.get(name, value) for name, value in wanted.items()}
    return {**variables, "PYTHONPATH": os.pathsep.join(paths)} if paths else variables


def enable_cpu() -> None:
    """Prepare this process, and the ones that it starts, to import and run SGLang without a GPU."""
    stubs = [] if has_gpu() else _stub_paths()
    os.environ.update(cpu_environment())
    sys.path[:0] = stubs
    if stubs:
        _tell_transformers()
    if not has_gpu():
        # SGLang's kernels of quantized weights say at import that they are for GPUs, which is no news without one.
        warnings.filterwarnings("ignore", message="Only CUDA.* support .* currently", category=UserWarning)


def _tell_transformers() -> None:
    """Let a transformers that was imported before the stand-in of torchvision was there look for it again.

    It remembers which packages there are, and puts placeholders in the place of classes that want one that is missing.

    Source: transformers@5.12.1: utils/import_utils.py:_LazyModule
    """
    importlib.invalidate_caches()
    utils: Any = sys.modules.get("transformers.utils.import_utils")
    if utils is None:
        return
    for function in vars(utils).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    if not utils.is_torchvision_available():
        return
    for module in [each for each in sys.modules.values() if isinstance(each, utils._LazyModule)]:
        for name, missing in list(module._object_missing_backend.items()):
            if set(missing) == {"torchvision"}:
                del module._object_missing_backend[name]
                if getattr(vars(module).get(name), "is_dummy", False):
                    delattr(module, name)


def use_plain_host_memory() -> None:
    """Give SGLang's capture an allocator for device "cpu": its default registers or pins the memory with CUDA.

    Source: sglang@0.5.20: srt/mem_cache/pool_host/common.py:ALLOC_MEMORY_FUNCS; sglang@0.5.15.post1, which asks torch:
        srt/state_capturer/base.py:BaseHostCache, srt/model_executor/forward_batch_info.py:prepare_mlp_sync_batch
    """
    from sglang.srt.mem_cache.pool_host import common
    from sglang.srt.model_executor import forward_batch_info
    from sglang.srt.state_capturer import base

    def allocate(
        dims: Any, dtype: Any, device: Any, pin_memory: bool, allocator: Any, registration_granularity_bytes: Any = None
    ) -> Any:
        return allocator.allocate(dims, dtype=dtype, device=device)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
    if "ALLOC_MEMORY_FUNCS" not in vars(base):
        base.torch = forward_batch_info.torch = _Unpinned()


class _Unpinned:
    """Stands in for torch in modules of SGLang that ask it for pinned memory, which is as any other here."""

    def __getattr__(self, name: str) -> Any:
        import torch

        found = getattr(torch, name)
        if name not in ("tensor", "zeros"):
            return found

        def make(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
            return found(*args, **options)

        return make


def let_native_attention_pad() -> None:
    """Give SGLang's torch_native attention the length of a padded sequence on a CPU, which DP attention asks for.

    Source: sglang@0.5.20: srt/layers/attention/intel_amx_backend.py:get_cpu_graph_seq_len_fill_value;
        sglang@0.5.15.post1, where it is that of CUDA graphs: srt/model_executor/forward_batch_info.py
    """
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1
    TorchNativeAttnBackend.get_cuda_graph_seq_len_fill_value = lambda self: 1


def let_dp_attention_run() -> None:
    """Give SGLang's DP attention copies and collectives that are no GPU kernels, in releases that have none.

    Source: sglang@0.5.15.post1: srt/layers/dp_attention.py:memcpy_triton, srt/distributed/parallel_state.py:
        GroupCoordinator; sglang@0.5.20, where both ask for a CPU
    """
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers import dp_attention

    if hasattr(dp_attention, "memcpy_cpu"):
        return

    def copy(to: Any, rows: Any, dim: int, start: Any, size: Any, from_start: bool) -> None:
        at = slice(int(start), int(start) + int(size))
        if from_start:
            to[: int(size)] = rows[at]
        else:
            to[at] = rows[: int(size)]

    dp_attention.memcpy_triton = copy
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        setattr(GroupCoordinator, name, getattr(GroupCoordinator, f"_{name}"))


def _stub_paths() -> list[str]:
    """Return the folder of each stand-in whose original is not installed and which is not on the path yet."""
    folders = [STUBS / name for name in ("for_sgl_kernel", "for_torchvision")]
    return [str(folder) for folder in folders if PathFinder.find_spec(folder.name.removeprefix("for_")) is None]
