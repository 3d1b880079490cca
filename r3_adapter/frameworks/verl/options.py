"""What a user may choose: variables of the environment, which Ray hands on to all of verl's processes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from r3_adapter.errors import ReplayError, check_choice
from r3_adapter.megatron.backends import Backend
from r3_adapter.repack import LastRow

_PREFIX = "R3_VERL_"
Switch = Literal["on", "off"]


@dataclass(frozen=True)
class Options:
    """Choices of the plug-in; each is a variable R3_VERL_ and the name in capitals.

    backend: how routes reach the routers; see r3_adapter.megatron.attach.
    last_row: of a sample, whose last token verl feeds and which has no route; see r3_adapter.megatron.replay.prepare.
    dispatch_plan: exchange token counts once a pass, and not in each MoE layer, where all rows have routes.
    """

    backend: Backend = "auto"
    last_row: LastRow = "balanced"
    dispatch_plan: Switch = "on"

    def __post_init__(self) -> None:
        check_choice(f"{_PREFIX}BACKEND", self.backend, Backend, ReplayError)
        check_choice(f"{_PREFIX}LAST_ROW", self.last_row, LastRow, ReplayError)
        check_choice(f"{_PREFIX}DISPATCH_PLAN", self.dispatch_plan, Switch, ReplayError)

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> "Options":
        """Read the variables.

        Raises:
            ReplayError: One that is not known, or a value that is none of its choices.
        """
        given = {name: value for name, value in variables.items() if name.startswith(_PREFIX)}
        known = {f"{_PREFIX}{name.upper()}": name for name in cls.__dataclass_fields__}
        for name in given:
            if name not in known:
                raise ReplayError(f"{name} is none of {', '.join(known)}")
        return cls(**{known[name]: value for name, value in given.items()})  # type: ignore[arg-type]
