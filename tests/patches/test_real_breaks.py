"""A break that is put into the installed Megatron-core is named before anything runs."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from r3_adapter.patch.rebase.breaks import find_breaks
from r3_adapter.patch.rebase.sides import Side, make_side
from r3_adapter.patch.rebase.tree import as_patched
from r3_adapter.patch.release import release_files
from r3_adapter.patch.series import Contents, Series, read_patches

pytestmark = pytest.mark.megatron

GPT_MODEL = "megatron/core/models/gpt/gpt_model.py"
MOE_UTILS = "megatron/core/transformer/moe/moe_utils.py"
# What upstream might do, as (pattern, replacement) by path; "" stands for all files.
CONFIG = "megatron/core/transformer/transformer_config.py"
EDITS: Mapping[str, tuple[str, str]] = {
    "": (r"\bmoe_expert_capacity_factor\b|(?<!def )\b_?checkpointed_forward(?=\()", "renamed"),
    GPT_MODEL: (r"^from torch import Tensor$", ""),
    MOE_UTILS: (r"(?<=def )_?compute_topk\b|\bnum_out_tokens\b", "renamed_here"),
    CONFIG: (r"\bmoe_permute_fusion\b", "renamed_here"),
}
NAMED = (
    r'break .*moe/routed_experts\.py:\d+: "moe_expert_capacity_factor" is defined nowhere in megatron/core 999',
    rf"break {GPT_MODEL}:\d+: Undefined name `Tensor`",
    r'break .*moe/test_dispatch_plan\.py:\d+: Unexpected keyword argument "num_out_tokens" for "permute"',
    r'break .*moe/token_dispatcher\.py:\d+: "TransformerConfig" has no attribute "moe_permute_fusion"',
    rf"break {MOE_UTILS}:\d+: Undefined name `_?compute_topk`",
    r"break megatron/core/(transformer/transformer_block|recompute)\.py: .*checkpointed_forward is hooked; .* nowhere",
)


def broken(files: Mapping[str, bytes | None], side: Side | None = None) -> Contents:
    """Return files with the edits, which leave alone the lines that the series adds to a side."""
    result: Contents = {}
    for path, data in files.items():
        ours = side.ours.get(path, frozenset()) if side else frozenset[int]()
        lines = (data or b"").decode().split("\n")
        edits = [EDITS[where] for where in ("", path) if where in EDITS]
        for at in range(len(lines)):
            if at + 1 not in ours:
                for pattern, new in edits:
                    lines[at] = re.sub(pattern, new, lines[at])
        result[path] = "\n".join(lines).encode() if data is not None else None
    return result


def test_each_break_is_named(megatron_series: Series, tmp_path: Path) -> None:
    series = megatron_series
    files = release_files(series.distribution, series.version, series.prefix, series.package)
    files = {path: data for path, data in files.items() if path.endswith(".py")}
    changed = as_patched(read_patches(series), files)
    pinned = make_side(tmp_path / "pinned", series, series.version, files, changed)
    assert find_breaks(pinned, pinned) == []
    new = make_side(tmp_path / "new", series, "999", broken(files), broken(changed, pinned))
    said = "\n".join(f"{'break' if each.breaks else 'read'} {each}" for each in find_breaks(pinned, new))
    for text in NAMED:
        assert re.search(f"^{text}", said, re.MULTILINE), (text, said)
