"""How experts get to routers."""

from typing import Literal

Channel = Literal["patch", "native"]
"""As an argument of the patched Megatron, or by Megatron's own RouterReplay."""
Backend = Literal["auto", "patch", "native"]
"""A channel by name, or whichever fits: what the model is attached with, or what the installed Megatron has."""
