"""Weights into and out of Megatron's models by megatron-bridge's conversion, and proof that none was left out."""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch

from r3_adapter.errors import ReplayError
from r3_adapter.megatron.bridge.library import converter
from r3_adapter.megatron.policy_trainer.checkpoint import Checkpoint


class State(Mapping[str, torch.Tensor]):
    """A checkpoint's tensors as megatron-bridge looks at them; keeps the names of those that it has read."""

    def __init__(self, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> None:
        self._names, self._read = frozenset(names), read
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        self.used.add(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def source(self) -> "State":
        return self

    def get_all_keys(self) -> list[str]:
        return sorted(self._names)

    def has_glob(self, pattern: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in self._names)


def load(chunks: Sequence[torch.nn.Module], checkpoint: Checkpoint, *, without: tuple[str, ...] = ()) -> set[str]:
    """Copy this rank's share of a checkpoint into its model chunks; return the names of the tensors read.

    All ranks must call it. without: beginnings of the names of parameters that are left as they are.

    Raises:
        ReplayError: a parameter that no tensor of the checkpoint makes, or one that does not fit.
    """
    made, models = converter(checkpoint.config), _models(chunks)
    state = State(checkpoint.names(), checkpoint.read)
    tasks = _tasks(made, models, _pretrained(made, state, str(checkpoint.folder)), without)
    with torch.no_grad():
        for task in tasks:
            if task.megatron_module is None or task.param_name.startswith(without):
                continue
            try:
                data = task.mapping.hf_to_megatron(
                    made.maybe_modify_loaded_hf_weight(task.mapping.hf_param, state), task.megatron_module
                )
            except (KeyError, AssertionError, RuntimeError, ValueError) as error:
                if isinstance(error, ReplayError):
                    raise
                raise ReplayError(f"{task.global_param_name}: made of {task.mapping.hf_param}: {error}") from error
            if data.shape != task.param_weight.shape:
                shape = tuple(task.param_weight.shape)
                raise ReplayError(
                    f"{task.global_param_name}: shape {shape} != {tuple(data.shape)} made of {task.mapping.hf_param}"
                )
            task.param_weight.copy_(data)
        made._broadcast_shared_embeddings(models)
    return state.used


def tensors_of(
    chunks: Sequence[torch.nn.Module], config: Mapping[str, Any], like: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of the checkpoint that the chunks of all ranks make, whole, on every rank in the same order.

    like: the checkpoint's tensors, of which names, shapes and dtypes are looked at.
    """
    made, models = converter(config), _models(chunks)
    pretrained = _pretrained(made, State(like, like.__getitem__), "")
    tasks = _tasks(made, models, pretrained, ())
    yield from made.stream_weights_megatron_to_hf(
        models, pretrained, cpu=False, show_progress=False, conversion_tasks=tasks
    )


def _models(chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    from r3_adapter.megatron.layers import unwrapped

    models = [unwrapped(chunk) for chunk in chunks]
    for model in models:
        # Megatron's own configurations do not say it, and megatron-bridge asks them.
        tied = bool(getattr(model, "share_embeddings_and_output_weights", False))
        model.config.share_embeddings_and_output_weights = tied
    return models


def _pretrained(made: Any, state: State, place: str) -> Any:
    from r3_adapter.megatron.bridge.families import use_names

    use_names(made, state)
    return SimpleNamespace(config=made.hf_config, state=state, model_name_or_path=place)


def _tasks(made: Any, models: list[Any], pretrained: Any, without: tuple[str, ...]) -> list[Any]:
    """Return megatron-bridge's tasks, once it is known that each parameter of this rank has one.

    Raises:
        ReplayError: names a parameter that has none.
    """
    from megatron.bridge.models.conversion.utils import persistent_buffers

    tasks = made.build_conversion_tasks(pretrained, models)
    filled = {
        (task.vp_stage, task.param_name) for task in tasks if task is not None and task.megatron_module is not None
    }
    for stage, model in enumerate(models):
        tied = model.config.share_embeddings_and_output_weights
        for name, _ in chain(model.named_parameters(), persistent_buffers(model)):
            if (stage, name) in filled or name.startswith(without) or (tied and name == "output_layer.weight"):
                continue
            found = made.mapping_registry().megatron_to_hf_lookup(name)
            want = "of no name that is known" if found is None else f"made of {found.hf_param}"
            raise ReplayError(f"{name}: no tensor of the checkpoint makes this parameter, {want}")
    return [task for task in tasks if task is not None]
