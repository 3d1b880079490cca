"""What `r3` says to those who use it wrongly: the usage of their command and a sentence, before anything starts."""

import json
from pathlib import Path

import pytest

from r3_adapter import cli

WRONG = {
    "prove --tpp 2": "unrecognized arguments: --tpp 2",
    "prove 2": "unrecognized arguments: 2",
    "prove --dp 0": "argument --data-parallel-size/--dp: 0 < 1",
    "prove --tp -1": "argument --tensor-model-parallel-size/--tp: -1 < 1",
    "prove --tp 2.5": "argument --tensor-model-parallel-size/--tp: '2.5' is not a whole number",
    "prove --seed -1": "argument --seed: -1 < 0",
    "prove --seed 4294967296": "argument --seed: 4294967296 > 2147483647",
    "prove --group 0": "argument --group: 0 < 1",
    "prove --turns -1": "argument --turns: -1 < 1",
    "bench replay --pairs 0": "argument --pairs: 0 < 2",
    "bench capture --pairs 1": "argument --pairs: 1 < 2",
    "bench repack --max-mib 0": "argument --max-mib: 0 < 1",
    "bench repack --pairs 2": "unrecognized arguments: --pairs 2",
    "patch status --all": "unrecognized arguments: --all",
    "report run --output page.html": "unrecognized arguments: --output page.html",
    "plan --model-config x --megatron-args {": "argument --megatron-args: '{' is no JSON: Expecting property name "
    "enclosed in double quotes: line 1 column 2 (char 1)",
    "plan --model-config x --sglang-args [1]": "argument --sglang-args: '[1]' is no JSON object, such as "
    "'{\"name\": 1}'",
    "plan --model-config x --seed -1": "argument --seed: -1 < 0",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_flags_are_refused_under_the_usage_of_their_command(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(line.split())
    said = capsys.readouterr()
    words = line.split()
    command = " ".join(words[: 2 if words[0] in ("bench", "patch") else 1])
    assert said.err.startswith(f"usage: r3 {command} ")
    assert said.err.endswith(f"\nr3 {command}: error: {WRONG[line]}\n")
    assert said.out == ""


CONFIG = {"name": "run", "flags": {}, "model": "m", "layout": {}, "seed": 0, "versions": {}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "{path}: no such file"),
        ({}, "{path}: no name, which must be a string"),
        (CONFIG | {"seed": "1"}, "{path}: seed is '1', not a whole number"),
        (CONFIG | {"flags": None}, "{path}: flags is None, not an object"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, object] | None, message: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err == f"r3: {message.format(path=tmp_path / 'config.json')}\n"


def test_an_error_of_the_system_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r3_adapter.bench.repack.bench_repack", lambda max_mib: {"max_mib": max_mib})
    assert cli.main(["bench", "repack", "--json", "/dev/full"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out) == {"max_mib": 4096}
    assert said.err == "r3: No space left on device\n"


UNFIT = {
    "--tp 3": "trainer: inner size of an expert: etp (3) does not divide moe_intermediate_size (32)",
    "--tp 3 --etp 1 --ep 2": "trainer: attention heads: tp (3) does not divide num_attention_heads (4)",
    "--tp 4": "trainer: key-value heads: tp (4) does not divide num_key_value_heads (2)",
    "--ep 3": "trainer: experts: ep (3) does not divide experts (32)",
    "--pp 3": "pipeline stages: pp * vpp (3 * 1) does not divide num_layers (8); say which layers each stage has with "
    "--pipeline-model-parallel-layout",
    "--pp 2 --vpp 3": "pipeline stages: pp * vpp (2 * 3) does not divide num_layers (8); say which layers each stage "
    "has with --pipeline-model-parallel-layout",
    "--vpp 2": "vpp (2) > 1, but pp is 1 in ParallelLayout(tp=1, pp=1, vpp=2, cp=1, ep=1, etp=1, dp=1)",
    "--pp 2 --pipeline-model-parallel-layout Et|tL": "pipeline stages: pipeline layout 'Et|tL': 2 layers != "
    "num_layers (8)",
    "--pp 2 --pipeline-model-parallel-layout Et*8L": "pipeline stages: pipeline layout 'Et*8L': 1 parts != pp * vpp "
    "(2 * 1)",
    "--pipeline-model-parallel-layout Et*99999999999L": "pipeline stages: pipeline layout 'Et*99999999999L': a number "
    "of 11 digits > num_layers (8)",
    "--pipeline-model-parallel-layout E(t*999)*999L": "pipeline stages: pipeline layout 'E(t*999)*999L': 998003 "
    "letters, far more than layers (8)",
    "--inject nonsense": "--inject 'nonsense' is none of shift-token, swap-layers, swap-samples",
    '--sglang-args {"dtype":"float16"}': "SGLang's dtype ('float16') is given by the self-test itself",
    "--retract --turns 2": "retract with turns (2) > 1: conversations run one after the other",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flags", UNFIT)
def test_a_proof_that_cannot_be_made_is_refused_before_the_rollout(
    flags: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r3_adapter.proof.prove.floor_and_rollout", lambda *_, **__: pytest.fail("a rollout"))
    assert cli.main(["prove", *flags.split()]) == 2
    assert capsys.readouterr().err == f"r3: {UNFIT[flags]}\n"


def test_a_name_on_a_hub_is_no_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model-config", "Qwen/Qwen3-30B-A3B"]) == 2
    why = "no such file; models are not looked up on a hub, give a checkpoint's folder"
    assert capsys.readouterr().err == f"r3: Qwen/Qwen3-30B-A3B: cannot be read: {why}\n"
