"""The function that SGLang calls in each of its processes (entry point group "sglang.srt.plugins")."""

import os
from importlib.metadata import entry_points

from r3_adapter.errors import CaptureError
from r3_adapter.sglang.cpu import has_gpu, let_dp_attention_run, let_native_attention_pad, use_plain_host_memory
from r3_adapter.sglang.grouped_attention import group_native_attention
from r3_adapter.sglang.grouped_experts import group_native_experts
from r3_adapter.sglang.meeting import meet_in_private
from r3_adapter.sglang.perturb import VARIABLE, Perturbation

GROUP, NAME = "sglang.srt.plugins", "r3_adapter"


def check_installed() -> None:
    """Make sure that SGLang will find `register`: SGLang itself ignores a plugin that it cannot find.

    Raises:
        CaptureError: The entry point is not installed, or SGLANG_PLUGINS leaves it out.
    """
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and NAME not in [name.strip() for name in allowed.split(",")]:
        raise CaptureError(f"SGLANG_PLUGINS ({allowed}) leaves out {NAME}")
    if not entry_points(group=GROUP, name=NAME):
        raise CaptureError(f"no entry point {NAME} in group {GROUP}: install r3-adapter (`pip install -e .`)")


def register() -> None:
    """Make capture work without a GPU, let ranks meet through a private file, and perturb experts if R3_PERTURB is set.

    Raises:
        SystemExit: R3_PERTURB is malformed. SGLang logs other errors of a plugin and goes on without it.
    """
    meet_in_private()
    if not has_gpu():
        use_plain_host_memory()
        let_native_attention_pad()
        let_dp_attention_run()
        group_native_attention()
        group_native_experts()
    if text := os.environ.get(VARIABLE):
        try:
            Perturbation.parse(text).install()
        except Exception as error:
            raise SystemExit(f"{VARIABLE}={text!r}: {error!r}") from error
