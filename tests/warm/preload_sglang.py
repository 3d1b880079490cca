"""What a rollout's process imports, and what the engine's other processes do, on a machine without a GPU."""

import importlib
import multiprocessing
import threading
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.popen_fork import Popen
from typing import Any

from r3_adapter.sglang.cpu import enable_cpu

enable_cpu()
for name in (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "r3_adapter.sglang.worker",
):
    importlib.import_module(name)


class Context(SpawnContext):
    """Fork what the engine would spawn, for that would import all of this anew; not where a thread may have a lock."""

    class Process(SpawnProcess):
        @staticmethod
        def _Popen(process_obj: Any) -> Any:
            return Popen(process_obj) if threading.active_count() == 1 else SpawnProcess._Popen(process_obj)


multiprocessing.context._concrete_contexts["spawn"] = Context()
