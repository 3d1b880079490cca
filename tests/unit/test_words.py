"""Every public function and dataclass refuses a word that it does not know, and names the known ones."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r3_adapter import errors
from r3_adapter.arguments import RECOMPUTE, add_r3_arguments, add_rl_arguments
from r3_adapter.commands.prove import add_prove
from r3_adapter.errors import CaptureError, R3Error
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.megatron.attach import attach
from r3_adapter.megatron.batches import micro_batches
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.megatron.policy_trainer.trainer import PolicyOptions
from r3_adapter.megatron.pretraining import prepared
from r3_adapter.megatron.replay import prepare, prepare_step
from r3_adapter.parsers import OneCommandParser
from r3_adapter.proof.damage import damage
from r3_adapter.proof.prove import prove
from r3_adapter.proof.scoring import score
from r3_adapter.proof.tiny import write_checkpoint
from r3_adapter.ray.batch import items_of
from r3_adapter.repack import repack
from r3_adapter.rl.losses import Objective
from r3_adapter.sglang.capture import check_finished, computations_from_reply, trace_from_reply
from r3_adapter.sglang.engine import generate_over_http, rollout_in_subprocess, samples_of
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.settings import EngineSettings

PACKAGE = Path(errors.__file__).parent
ONE, CPU = ParallelLayout(), torch.device("cpu")
PACKED = Packing("thd", (1,))
MOE = MoEConfig(num_layers=1, layer_ids=(0,), num_experts=4, topk=1)
SETTINGS = EngineSettings(model_path="/nonexist")
REPLY: dict[str, Any] = {"meta_info": {"finish_reason": {"type": "abort"}}, "output_ids": [1]}
Call = Callable[[Any], Any]
CALLS: list[tuple[str, str, Call]] = [
    ("staleness", "'refuse', 'live', 'keep'", lambda word: prepare(None, [], None, staleness=word, layout=ONE)),  # type: ignore[arg-type]
    ("staleness", "'refuse', 'live', 'keep'", lambda word: prepared(print, print, replay=False, staleness=word)),  # type: ignore[arg-type]
    ("staleness", "'refuse', 'live', 'keep'", lambda word: PolicyOptions(staleness=word)),
    ("backend", "'auto', 'patch', 'native'", lambda word: prepare(None, [], None, backend=word, layout=ONE)),  # type: ignore[arg-type]
    ("backend", "'auto', 'patch', 'native'", lambda word: attach([], word)),
    ("outside", "'live', 'refuse'", lambda word: attach([], outside=word)),
    ("aux_losses", "'replayed', 'live'", lambda word: attach([], aux_losses=word)),
    ("attach", "'auto', 'patch', 'native'", lambda word: TrainerOptions(attach=word)),
    ("replay", "'off', 'r2', 'r3'", lambda word: PolicyOptions(replay=word)),
    ("estimator", "'grpo', 'gspo'", lambda word: Objective(estimator=word)),
    ("estimator", "'grpo', 'gspo'", lambda word: items_of([], word)),
    ("dispatcher", "'alltoall', 'allgather'", lambda word: TrainerOptions(dispatcher=word)),
    ("recompute", "'none', 'full', 'moe'", lambda word: TrainerOptions(recompute=word)),
    ("qkv_format", "'sbhd', 'thd'", lambda word: TrainerOptions(qkv_format=word)),
    ("qkv_format", "'sbhd', 'thd'", lambda word: Packing(word, (1,))),
    ("cp_cut", "'zigzag', 'contiguous'", lambda word: TrainerOptions(cp_cut=word)),
    ("cp_cut", "'zigzag', 'contiguous'", lambda word: Packing("thd", (1,), word)),
    ("last_row", "'live', 'balanced'", lambda word: prepare(None, [], None, last_row=word, layout=ONE)),  # type: ignore[arg-type]
    (
        "last_row",
        "'live', 'balanced'",
        lambda word: repack([], Packing("thd", (1,)), ONE, 0, layer_ids=[], last_row=word),
    ),
    ("qkv_format", "'sbhd', 'thd'", lambda word: micro_batches([], ONE, 0, size=1, qkv_format=word, device=CPU)),
    ("pass", "'live', 'replay', 'train'", lambda word: score(Path(), [], ONE, passes=("live", word))),
    (
        "routed_experts_format",
        "'safetensors', 'flat', 'exact-flat'",
        lambda word: EngineSettings("m", routed_experts_format=word),
    ),
    ("missing", "'raise', 'keep'", lambda word: trace_from_reply(REPLY, [1], missing=word)),
    ("aborted", "'raise', 'keep'", lambda word: computations_from_reply(REPLY, [1], aborted=word)),
    ("aborted", "'raise', 'keep'", lambda word: check_finished(REPLY, "reply", aborted=word)),
    ("recomputed", "'raise', 'split'", lambda word: samples_of([], [], MOE, recomputed=word)),
    ("recomputed", "'raise', 'split'", lambda word: generate_over_http("none:", [], {}, MOE, recomputed=word)),
    ("recomputed", "'raise', 'split'", lambda word: rollout_in_subprocess(SETTINGS, [], {}, recomputed=word)),
    ("injection", "'shift-token', 'swap-layers', 'swap-samples'", lambda word: prove(ONE, injection=word)),
    ("injection", "'shift-token', 'swap-layers', 'swap-samples'", lambda word: damage([], word)),
    ("dtype", "'float32', 'bfloat16'", lambda word: write_checkpoint(Path("/nonexist"), dtype=word, seed=0)),
]


@pytest.mark.parametrize("word", ["ignore", "", True, np.str_("Keep"), ["keep"]])
@pytest.mark.parametrize(("name", "known", "call"), CALLS)
def test_an_unknown_word_is_refused_where_it_comes_in(name: str, known: str, call: Call, word: object) -> None:
    with pytest.raises(R3Error) as raised:
        call(word)
    assert str(raised.value) == f"{name} {word!r} is none of {known}"


def test_a_step_names_the_ranks_that_were_given_an_unknown_word(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(R3Error, match="staleness 'ignore' is none of 'refuse', 'live', 'keep'"):
            prepare_step([None], [], staleness="ignore", layout=ONE)  # type: ignore[arg-type,list-item]
    finally:
        torch.distributed.destroy_process_group()


def test_engine_settings_in_a_file_are_checked_too() -> None:
    text = SETTINGS.to_json().replace('"safetensors"', '"saftensors"')
    with pytest.raises(CaptureError, match="routed_experts_format 'saftensors' is none of 'safetensors', 'flat'"):
        EngineSettings.from_json(text)


def test_every_literal_of_the_package_has_a_check() -> None:
    """A Literal alone is a hint: at run time any word passes."""
    declared, checked = dict[str, str](), set[str]()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and _is_literal(node.value):
                declared[ast.unparse(node.targets[0])] = path.name
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("check_choice"):
                checked.add(ast.unparse(node.args[2]))
            elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
                assert not _is_literal(node.annotation), f"{path.name}: {ast.unparse(node)} has no name to check by"
    of_tables = {"Refuser"}  # Words of a table in code, which nobody passes in.
    assert {name: file for name, file in declared.items() if name not in checked | of_tables} == {}
    assert len(declared) >= 11


def test_flags_take_the_same_words() -> None:
    parser = OneCommandParser()
    add_prove(parser.add_subparsers(dest="command"))
    for add in (add_r3_arguments, add_rl_arguments):
        add(parser)
    prove_parser = parser._subparsers._group_actions[0].choices["prove"]  # type: ignore[union-attr,index]
    choices = {action.dest: action.choices for each in (parser, prove_parser) for action in each._actions}
    calls: dict[str, Call] = {
        "r3_staleness": lambda word: PolicyOptions(staleness=word),
        "advantage_estimator": lambda word: Objective(estimator=word),
        "dispatcher": lambda word: TrainerOptions(dispatcher=word),
        "recompute_granularity": lambda word: TrainerOptions(recompute=RECOMPUTE[word]),
        "qkv_format": lambda word: TrainerOptions(qkv_format=word),
        "cp_cut": lambda word: TrainerOptions(cp_cut=word),
    }
    for name, call in calls.items():
        for word in choices[name] or [None]:
            call(word)


def _is_literal(node: ast.expr) -> bool:
    return isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal")
