import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def slimelike() -> ModuleType:
    """The frameworks' layouts in our own words; what it defines passes as slime's."""
    spec = importlib.util.spec_from_file_location("slime.like", Path(__file__).with_name("slimelike.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["slime.like"] = module
    spec.loader.exec_module(module)
    return module
