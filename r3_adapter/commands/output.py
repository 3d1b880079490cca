"""How a command prints its figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def print_json(report: Mapping[str, Any], path: Path | None) -> None:
    text = json.dumps(report, indent=2)
    # First where nothing can be lost: the disk may be full by now.
    print(text, flush=True)
    if path:
        path.write_text(text + "\n", encoding="utf-8")
