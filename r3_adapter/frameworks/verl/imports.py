"""Change modules as they are imported: verl loads a plug-in before the modules that the plug-in changes."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Change = Callable[[ModuleType], None]


class ChangeOnImport(MetaPathFinder):
    """Finds the modules that it is to change, and changes each once it has been executed."""

    def __init__(self, changes: dict[str, Change]) -> None:
        self._changes = dict(changes)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that other finders have, with a loader that makes the change."""
        change = self._changes.pop(fullname, None)
        if change is None:
            return None
        try:
            spec = importlib.util.find_spec(fullname)
        except BaseException:
            self._changes[fullname] = change
            raise
        if spec is None or spec.loader is None:
            self._changes[fullname] = change
            return None
        spec.loader = _ChangingLoader(spec.loader, change)
        return spec


class _ChangingLoader(Loader):
    def __init__(self, loader: Loader, change: Change) -> None:
        self._loader, self._change = loader, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._change(module)

    def __getattr__(self, name: str) -> object:
        # What else a loader has: the source of a traceback, data files.
        return getattr(self._loader, name)


def change_on_import(changes: dict[str, Change]) -> None:
    """Make each change of a module now, if it is imported already, or when it is."""
    waiting = {}
    for name, change in changes.items():
        module = sys.modules.get(name)
        if module is None:
            waiting[name] = change
        else:
            change(module)
    sys.meta_path.insert(0, ChangeOnImport(waiting))
