"""What verl loads in each of its processes: VERL_USE_EXTERNAL_MODULES=r3_adapter.frameworks.verl.plugin.

verl imports it at the end of its own first import, before the modules that replay is about; these are changed when they
are imported. Without rollout.enable_rollout_routing_replay everything is as it is without the plug-in.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from r3_adapter.errors import ReplayError
from r3_adapter.frameworks.verl import engine, rollout
from r3_adapter.frameworks.verl.imports import change_on_import
from r3_adapter.frameworks.verl.options import Options

OLDEST = "0.9.1"


def install() -> None:
    """Let verl's modules be changed as they are imported.

    Raises:
        ReplayError: verl is not installed or older than OLDEST; a variable R3_VERL_... that is not known.
    """
    try:
        found = version("verl")
    except PackageNotFoundError:
        raise ReplayError("verl is not installed in this environment, and this is a plug-in of it") from None
    if Version(found) < Version(OLDEST):
        raise ReplayError(f"verl {found} < {OLDEST}: earlier versions are not supported")
    Options.from_environment()
    change_on_import(
        {
            "verl.workers.rollout.sglang_rollout.async_sglang_server": rollout.change_server,
            "verl.workers.engine_workers": engine.change_workers,
            "verl.workers.engine.megatron.transformer_impl": engine.change_engine,
        }
    )


install()
