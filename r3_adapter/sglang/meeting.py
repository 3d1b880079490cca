"""Let the ranks of an engine find each other through a file that only this user can read, not through a port.

torch's store listens at every address of the host, authenticates nobody, and tells where the ranks' own sockets are.
"""

import importlib
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

FOLDER = "R3_MEETING_FOLDER"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def meet_in_private() -> None:
    """Take a file in the folder that R3_MEETING_FOLDER names where a process group is to meet at a port of this host.

    Source: torch@2.13.0: torch/distributed/rendezvous.py:_rendezvous_helper
    """
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    # The package has a function of the module's name.
    handlers: dict[str, Any] = importlib.import_module("torch.distributed.rendezvous")._rendezvous_handlers
    at_port, in_file = handlers["tcp"], handlers["file"]

    def meet(url: str, *args: Any, **options: Any) -> Iterator[Any]:
        found = urlparse(url)
        if found.hostname not in _LOOPBACK:
            return at_port(url, *args, **options)  # type: ignore[no-any-return]
        # The ranks have one parent; a file of its number is not there from an engine before.
        place = found._replace(scheme="file", netloc="", path=f"{folder}/meeting-{os.getppid()}-{found.port}")
        return in_file(place.geturl(), *args, **options)  # type: ignore[no-any-return]

    handlers["tcp"] = meet
