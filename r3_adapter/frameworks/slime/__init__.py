"""A plug-in for slime and miles, by flags alone; docs/frameworks/slime.md has them.

`--custom-generate-function-path r3_adapter.frameworks.slime.generate`,
`--custom-convert-samples-to-train-data-path r3_adapter.frameworks.slime.convert`.
"""

from r3_adapter.frameworks.slime.rollout import convert, generate

__all__ = ["convert", "generate"]
