"""A plug-in for slime and miles, by flags alone; docs/frameworks/slime.md has them.

`--custom-generate-function-path r3_adapter.frameworks.slime.generate`,
`--custom-convert-samples-to-train-data-path r3_adapter.frameworks.slime.convert`, or `convert_packed` for even loads,
`--custom-megatron-init-path r3_adapter.frameworks.slime.init`.
"""

from r3_adapter.frameworks.slime.rollout import convert, generate
from r3_adapter.frameworks.slime.schedule import convert_packed
from r3_adapter.frameworks.slime.training import init

__all__ = ["convert", "convert_packed", "generate", "init"]
