"""What a rank of Megatron imports, on a machine without a GPU."""

import importlib

from r3_adapter.megatron import cpu
from r3_adapter.megatron.bridge import library

cpu.install()
for name in ("megatron.core", "megatron.core.distributed", "megatron.core.optimizer", "r3_adapter.proof.scoring_rank"):
    importlib.import_module(name)
if library.is_installed():
    library.library()
