"""What launch/pretrain_r3.sh says where something is missing, and the flags that it takes from a checkpoint."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from r3_adapter.errors import R3Error
from r3_adapter.megatron.pretrain_flags import check_folders, model_flags
from r3_adapter.proof.tiny import TinyModel, qwen3_moe_config
from r3_adapter.rollout import Sample, save_samples
from r3_adapter.trace import ModelId, RoutingTrace

SCRIPT = Path(__file__).parents[2] / "launch" / "pretrain_r3.sh"
CONFIG = qwen3_moe_config(TinyModel(num_layers=5, num_experts=8, topk=2, hidden_size=16, vocab_size=60), "float32")


def make() -> Sample:
    ids = np.tile(np.array([1, 3], np.uint8), (4, 5, 1))
    tokens, versions = np.arange(4, dtype=np.int32), np.zeros(4, np.int32)
    trace = RoutingTrace(ids, tokens, versions, np.arange(5, dtype=np.int32), 8, ("1",), ModelId(5, 16, 60))
    return Sample(trace, 2, np.full(2, -1, np.float32), 0)


def write_folders(folder: Path) -> tuple[Path, Path]:
    """Return folders of samples and of a checkpoint that has no weights to speak of."""
    save_samples(folder / "traces" / "0", [make()])
    CONFIG.save_pretrained(folder / "checkpoint")
    save_file({"weight": np.zeros(1, np.float32)}, folder / "checkpoint" / "model.safetensors")
    return folder / "traces", folder / "checkpoint"


def test_rollouts_of_the_checkpoints_model_are_taken(tmp_path: Path) -> None:
    hf = check_folders(*write_folders(tmp_path))
    flags = model_flags(hf)
    for name, value in {"num-layers": "5", "hidden-size": "16", "num-experts": "8", "moe-router-topk": "2"}.items():
        assert flags[flags.index(f"--{name}") + 1] == value
    assert "--moe-layer-freq" not in flags
    flags_of_mixed = model_flags({**hf, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert flags_of_mixed[flags_of_mixed.index("--moe-layer-freq") + 1] == "[0,1,0,0,0]"
    assert "--untie-embeddings-and-output-weights" in flags and "--moe-router-pre-softmax" not in flags


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("num_hidden_layers", 4, "num_hidden_layers (5) of its model != 4"),
        ("hidden_size", 32, "hidden_size (16) of its model != 32"),
        ("vocab_size", 512, "vocab_size (60) of its model != 512"),
        ("num_experts", 32, "num_experts (8) of its model != 32"),
        ("num_experts_per_tok", 4, "num_experts_per_tok (2) of its model != 4"),
    ],
)
def test_rollouts_of_another_model_are_refused(tmp_path: Path, name: str, size: int, said: str) -> None:
    traces, checkpoint = write_folders(tmp_path)
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: size}))
    with pytest.raises(R3Error) as caught:
        check_folders(traces, checkpoint)
    where = f"of {checkpoint}, which it was not rolled out with"
    assert str(caught.value) == f"{traces / '0'}: sample 0: {said} {where}"


def test_what_is_not_translated_is_refused(tmp_path: Path) -> None:
    hf = dict(check_folders(*write_folders(tmp_path)))
    with pytest.raises(R3Error, match=r"^model_type 'llama' != 'qwen3_moe', which has a table of weights$"):
        model_flags({**hf, "model_type": "llama"})
    with pytest.raises(R3Error, match=r"attention_bias, use_sliding_window or hidden_act: not Qwen3-MoE's defaults$"):
        model_flags({**hf, "attention_bias": True})


def say(*arguments: str, **variables: str) -> tuple[int, str]:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    done = subprocess.run(
        [str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_the_script_says_in_a_line_what_is_missing(tmp_path: Path) -> None:
    wants = "pretrain_r3: wants two folders: launch/pretrain_r3.sh TRACES CHECKPOINT --r3 [ARGUMENT...]\n"
    for arguments in ((), ("traces",), ("traces", "--r3"), ("--r3", "traces", "checkpoint")):
        assert say(*arguments) == (2, wants)
    assert say("a", "b", WORLD_SIZE="two") == (2, "pretrain_r3: WORLD_SIZE 'two' is no number of ranks\n")
    assert say("a", "b", PYTHON="/no/python") == (
        2,
        "pretrain_r3: no interpreter /no/python: set PYTHON, or make .venv-3.12 with "
        "PYTHON=python3.12 launch/test.sh\n",
    )
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    has_not = "has no package r3_adapter: set PYTHON to the interpreter of an environment that has it"
    assert say("a", "b", PYTHON=str(bare)) == (2, f"pretrain_r3: {bare} {has_not}\n")


@pytest.mark.megatron
def test_the_script_says_in_a_line_what_its_environment_lacks(tmp_path: Path) -> None:
    traces, checkpoint = write_folders(tmp_path)
    missing = tmp_path / "missing"
    if find_spec("megatron.training") is None:
        code, said = say(str(traces), str(checkpoint))
        assert said.startswith(
            f"pretrain_r3: {sys.executable} has no megatron.training, which comes with megatron-core"
        )
        assert (code, said.count("\n")) == (2, 1)
        return
    assert say(str(missing), str(checkpoint)) == (2, f"pretrain_r3: {missing}: no such folder\n")
    assert say(str(traces), str(missing)) == (2, f"pretrain_r3: {missing}: no such folder\n")
    said = f"pretrain_r3: {checkpoint}: neither a folder of samples nor one of such folders\n"
    assert say(str(checkpoint), str(checkpoint)) == (2, said)
