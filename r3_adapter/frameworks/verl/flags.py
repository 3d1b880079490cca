"""Check verl's command line before it starts: its configuration composes, the plug-in is loaded, replay is asked for.

python -m r3_adapter.frameworks.verl.flags OVERRIDES...; exits 2 and says what is wrong. It needs verl, and no GPU.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r3_adapter.errors import ReplayError, show
from r3_adapter.frameworks.verl.rollout import FORMAT
from r3_adapter.machine import version_of
from r3_adapter.signals import run_command

PLUG_IN = "r3_adapter.frameworks.verl.plugin"
_VARIABLE = "VERL_USE_EXTERNAL_MODULES"
_WANTED: Mapping[str, object] = {
    "actor_rollout_ref.rollout.name": "sglang",
    "actor_rollout_ref.rollout.enable_rollout_routing_replay": True,
    "actor_rollout_ref.rollout.engine_kwargs.sglang.routed_experts_format": FORMAT,
    "actor_rollout_ref.actor.strategy": "megatron",
    "actor_rollout_ref.actor.megatron.router_replay.mode": "disabled",
    "actor_rollout_ref.actor.megatron.dynamic_context_parallel": False,
    "actor_rollout_ref.model.use_fused_kernels": False,
}


def check_flags(overrides: Sequence[str]) -> list[str]:
    """Check verl's overrides of its configuration; return lines that say what was found.

    Raises:
        ReplayError: The plug-in is not loaded, verl's configuration does not take the overrides, or one is not what
            replay needs; names it.
    """
    found = [f"{name} {version_of(name) or 'is not installed'}" for name in ("verl", "sglang", "megatron-core")]
    if PLUG_IN not in os.environ.get(_VARIABLE, "").split(","):
        raise ReplayError(
            f"{_VARIABLE} ({os.environ.get(_VARIABLE)!r}) does not name {PLUG_IN}: export {_VARIABLE}={PLUG_IN}"
        )
    try:
        import verl
    except ImportError as error:
        raise ReplayError(
            f"verl cannot be imported by {sys.executable}: {error}; PYTHON names the interpreter that has it"
        ) from error
    if PLUG_IN not in sys.modules:
        raise ReplayError(f"verl {version_of('verl')} was imported and has not loaded {PLUG_IN}")
    config = composed(Path(verl.__file__).parent / "trainer" / "config", overrides)
    for name, want in _WANTED.items():
        if (have := config.get(name)) != want:
            raise ReplayError(f"{name} ({show(have)}) != {want!r}")
    return [*found, f"{PLUG_IN} is loaded", *(f"{name}={want}" for name, want in _WANTED.items())]


def composed(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return verl's configuration, as its own entry point composes it: those of _WANTED, by dotted name.

    Raises:
        ReplayError: It takes one of the overrides not.

    Source: verl/trainer/main_ppo.py@0.9.1:main
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(folder), version_base=None):
            config = compose("ppo_trainer", overrides=list(overrides))
        OmegaConf.resolve(config)
        return {name: OmegaConf.select(config, name) for name in _WANTED}
    except (HydraException, OmegaConfBaseException) as error:
        raise ReplayError(f"verl's configuration: {error}") from error


def main(argv: Sequence[str]) -> None:
    """Say what was found, or how to call it.

    Raises:
        ReplayError: as check_flags.
    """
    if not argv or {"-h", "--help"} & set(argv):
        print("usage: python -m r3_adapter.frameworks.verl.flags OVERRIDES...: those that you give to verl's main_ppo")
        return
    print("\n".join(check_flags(argv)))


if __name__ == "__main__":
    sys.exit(run_command("verl", lambda: main(sys.argv[1:])))
