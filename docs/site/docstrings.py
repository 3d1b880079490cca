"""Docstrings as the site shows them: what is said of an argument or a field is an item of a list."""

import re
from typing import Any

import griffe

_ITEM = re.compile(r"^(\w+(?:, \w+)*): ")
_SECTIONS = {"Args", "Raises", "Returns", "Yields", "Source", "Attributes", "Examples"}


class Lists(griffe.Extension):
    """Makes `name: what it is` at the start of a line an item, which Markdown would join to the line before."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(text: str) -> str:
    """Return a docstring with its items marked, and an empty line before the first one of a list."""
    lines: list[str] = []
    within = False
    for line in text.split("\n"):
        found = _ITEM.match(line)
        if found and found[1] not in _SECTIONS:
            if not within and lines and lines[-1].strip():
                lines.append("")
            names = ", ".join(f"`{name}`" for name in found[1].split(", "))
            lines.append(f"- {names}: {line[found.end() :]}")
            within = True
        else:
            within = within and line.startswith(" ")
            lines.append(line)
    return "\n".join(lines)
