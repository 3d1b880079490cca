# What mypy has to know of a base class to see that an attribute of the engine's structs is gone.
from typing import Any, ClassVar, dataclass_transform

def __getattr__(name: str) -> Any: ...
def field(*, default: Any = ..., default_factory: Any = ..., name: Any = ...) -> Any: ...

@dataclass_transform(field_specifiers=(field,))
class Struct:
    __struct_fields__: ClassVar[tuple[str, ...]]
    def __init_subclass__(cls, **kwargs: Any) -> None: ...
