"""Placements of experts: as a file, and as the order in which a checkpoint's tensors are read and written."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from r3_adapter.balance.table import Table, by_chance, in_order
from r3_adapter.errors import LayoutError, ReplayError, TraceError
from r3_adapter.megatron.placed import PlacedCheckpoint, in_checkpoint_order

LAYERS, EXPERTS = [1, 3], 8


@given(seed=st.integers(0, 2**32), groups=st.sampled_from([1, 2, 4]))
@settings(max_examples=20, deadline=None)
def test_a_placement_by_chance_is_read_as_it_was_written(seed, groups):
    made = by_chance(LAYERS, EXPERTS, seed, groups)
    made.check_groups(groups)
    again = Table.from_bytes(made.to_bytes())
    assert again == made and again.num_experts == EXPERTS
    assert np.array_equal(np.take_along_axis(made.expert_at, again.slots(LAYERS), axis=1), [range(EXPERTS)] * 2)
    assert np.array_equal(made.slots([3]), made.slots(LAYERS)[1:])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_are_refused(data):
    good = by_chance(LAYERS, EXPERTS, 0).to_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    damaged = bytearray(good)
    damaged[at] ^= data.draw(st.integers(1, 255))
    for bad in (bytes(damaged), good[:at], good + b"\0"):
        with pytest.raises(TraceError, match=r"^somewhere: "):
            Table.from_bytes(bad, "somewhere")


@pytest.mark.parametrize(
    ("layers", "expert_at", "says"),
    [
        ([0], [[0, 2]], r"expert_at of layer 0 is no permutation of 2 experts: expert \(2\) lies at slot 1"),
        ([4], [[1, 1]], r"expert_at of layer 4 is no permutation of 2 experts: expert 1 lies at 2 slots"),
        ([1, 0], [[0, 1], [1, 0]], r"layer_ids \[1, 0\] are not increasing"),
        ([0], [[0], [0]], r"1 layer_ids and expert_at \(2, 1\)"),
        ([], np.zeros((0, 2), np.int32), r"0 layer_ids"),
        ([0], np.zeros((1, 2), np.int64), r"expert_at: int64 \(1, 2\) is no int32 array of 2 dimensions"),
    ],
)
def test_what_is_no_placement_is_refused_by_name(layers, expert_at, says):
    table = expert_at if isinstance(expert_at, np.ndarray) else np.array(expert_at, np.int32)
    with pytest.raises(LayoutError, match=says):
        Table(table, np.array(layers, np.int32))


def test_groups_that_are_parted_and_layers_that_are_not_there_are_refused():
    rows = np.array([[2, 3, 0, 1], [0, 2, 1, 3]], np.int32)
    with pytest.raises(LayoutError, match=r"layer 3: slots 0 to 1 have experts of several of the 2 groups"):
        Table(rows, np.array(LAYERS, np.int32)).check_groups(2)
    with pytest.raises(LayoutError, match=r"layer 2 is none of the MoE layers \[1, 3\]"):
        in_order(LAYERS, 4).slots([1, 2])


def test_a_file_is_refused_by_its_path(tmp_path):
    with pytest.raises(TraceError, match=r"nothing: cannot be read: No such file"):
        Table.load(tmp_path / "nothing")
    path = in_order(LAYERS, 4).save(tmp_path / "file")
    assert Table.load(path) == in_order(LAYERS, 4)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TraceError, match=rf"^{path}: "):
        Table.load(path)


def tensors_of(kind: str) -> dict[str, torch.Tensor]:
    """Return tensors of four layers, of which two have experts, each with numbers of its own."""
    found = {"model.embed_tokens.weight": torch.rand(8, 3), "mtp.layers.1.mlp.experts.2.up_proj.weight": torch.rand(3)}
    for layer in range(4):
        at = f"model.layers.{layer}."
        found[at + "self_attn.gate.weight"] = torch.rand(EXPERTS, 3)
        if layer not in LAYERS:
            found[at + "mlp.gate_proj.weight"] = torch.rand(EXPERTS, 3)
        elif kind == "stacked":
            found[at + "mlp.router.weight"], found[at + "mlp.router.bias"] = torch.rand(EXPERTS, 3), torch.rand(EXPERTS)
            found[at + "mlp.experts.gate_up_proj_bias"] = torch.rand(EXPERTS, 5)
        else:
            found[at + "mlp.gate.weight"] = torch.rand(EXPERTS, 3)
            found[at + "mlp.gate.e_score_correction_bias"] = torch.rand(EXPERTS)
            found[at + "mlp.moe_statics.e_score_correction_bias"] = torch.rand(1, EXPERTS)
            found[at + "mlp.shared_expert_gate.weight"] = torch.rand(1, 3)
            found[at + "mlp.shared_experts.up_proj.weight"] = torch.rand(EXPERTS, 3)
            for expert in range(EXPERTS):
                found[at + f"mlp.experts.{expert}.up_proj.weight"] = torch.rand(4, 3)
    return found


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({}))
    return folder


@pytest.mark.parametrize("kind", ["each", "stacked"])
def test_tensors_are_read_by_slot_and_written_back_as_they_were(kind, tmp_path):
    tensors, placement = tensors_of(kind), by_chance(LAYERS, EXPERTS, 5)
    with PlacedCheckpoint(written(tmp_path, tensors), placement) as checkpoint:
        read = {name: checkpoint.read(name) for name in checkpoint.names()}
        moved = {name for name in read if not torch.equal(read[name], tensors[name])}
        assert moved and all(re.search("experts|gate|router|moe_statics", name) for name in moved)
        assert not any("shared" in name or "mtp" in name or "self_attn" in name for name in moved)
        restored = in_checkpoint_order(read, placement)
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)
    for layer in LAYERS:
        order = placement.expert_at[placement.row(layer)].tolist()
        at = f"model.layers.{layer}.mlp."
        if kind == "each":
            assert torch.equal(read[at + "gate.weight"], tensors[at + "gate.weight"][order])
            assert torch.equal(
                read[at + "experts.3.up_proj.weight"], tensors[at + f"experts.{order[3]}.up_proj.weight"]
            )
        else:
            assert torch.equal(read[at + "router.bias"], tensors[at + "router.bias"][order])


def test_tensors_whose_order_is_not_known_are_refused(tmp_path):
    odd = {"model.layers.1.mlp.gate_scores.scale": torch.rand(EXPERTS)}
    placement = by_chance(LAYERS, EXPERTS, 5)
    says = r"mlp.gate_scores.scale: whether this tensor has a row for each expert"
    with PlacedCheckpoint(written(tmp_path, odd), placement) as checkpoint, pytest.raises(ReplayError, match=says):
        checkpoint.read("model.layers.1.mlp.gate_scores.scale")
    with pytest.raises(ReplayError, match=r"7 rows != 8 experts of the placement"):
        in_checkpoint_order({"model.layers.1.mlp.gate.weight": torch.rand(7, 3)}, placement)
