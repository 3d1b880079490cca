"""megatron-bridge itself: whether it is installed, its import, and its converter for a checkpoint."""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import Version

from r3_adapter.errors import ReplayError, show
from r3_adapter.megatron.bridge import stub

# Modules of Megatron-core that look for TransformerEngine when they are imported, and that megatron-bridge imports.
_LOOK_FOR_TE = (
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.experimental_attention_variant_module_specs",
    "megatron.core.models.hybrid.hybrid_layer_specs",
    "megatron.core.models.hybrid.hybrid_model",
)


@cache
def is_installed() -> bool:
    """Return whether megatron-bridge is there, and a Megatron-core that it works with."""
    if find_spec("megatron") is None or find_spec("megatron.bridge") is None:
        return False
    try:
        return Version(version("megatron-core")) >= Version("0.19.0")
    except PackageNotFoundError:
        return False


@cache
def library() -> Any:
    """Import megatron-bridge, with a stand-in for TransformerEngine where that is missing; return its module.

    On a machine without a GPU r3_adapter.megatron.cpu must be installed before.

    Raises:
        ReplayError: it is not installed.
    """
    if not is_installed():
        raise ReplayError("megatron-bridge is not installed; docs/install.md says how, it needs Python 3.12")
    from importlib import import_module

    with _silence():
        if find_spec("transformer_engine") is not None:
            found = import_module("megatron.bridge")
        else:
            for name in _LOOK_FOR_TE:
                import_module(name)
            with stub.transformer_engine():
                found = import_module("megatron.bridge")
    # It warns of each tensor that it skips, where `weights` refuses it.
    logging.getLogger("megatron.bridge").setLevel(logging.ERROR)
    logging.getLogger("transformers.configuration_utils").addFilter(lambda each: "torch_dtype" not in each.getMessage())
    from r3_adapter.megatron.bridge import families

    families.register()
    return found


@contextmanager
def _silence() -> Iterator[None]:
    """What this machine lacks is no news: megatron-bridge says it of each module at import."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def hf_config(config: Mapping[str, Any]) -> Any:
    """Return a config.json as transformers' object, from the package's own classes alone.

    Raises:
        ReplayError: a model_type that transformers does not know.
    """
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as name:
        # As a file, since transformers writes infinity in a way that it undoes only when it reads one.
        Path(name, "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
        except Exception as error:
            kind = show(config.get("model_type"))
            raise ReplayError(f"model_type {kind}: transformers cannot read its config.json: {error}") from error


def converter(config: Mapping[str, Any]) -> Any:
    """Return megatron-bridge's converter for a checkpoint, by the architecture that its config.json names.

    Raises:
        ReplayError: an architecture that it does not know, or a checkpoint of quantized weights.
    """
    library()
    import megatron.bridge
    from megatron.bridge.models.conversion import model_bridge

    from r3_adapter.megatron.bridge import families

    found = config.get("architectures")
    if not (isinstance(found, list) and len(found) == 1 and isinstance(found[0], str)):
        raise ReplayError(f"architectures {show(found)} of config.json is not one name")
    if config.get("quantization_config"):
        raise ReplayError(
            f"{found[0]}: its weights are quantized (quantization_config); only unquantized ones are read"
        )
    if found[0] not in megatron.bridge.AutoBridge.list_supported_models():
        raise ReplayError(f"{found[0]} is no architecture that megatron-bridge {megatron.bridge.__version__} knows")
    import transformers

    made = model_bridge.get_model_bridge(getattr(transformers, found[0], found[0]), hf_config=hf_config(config))
    families.prepare(made)
    return made
