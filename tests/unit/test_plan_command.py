import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r3_adapter import cli
from r3_adapter.plan.model import ModelShape

SPEC = importlib.util.spec_from_file_location("plan_requests", Path(__file__).with_name("plan_requests.py"))
requests = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(requests)
# Megatron's, as it is imported.
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT, CONFIGS, QWEN, request_of = requests.ROOT, requests.CONFIGS, requests.QWEN, requests.request_of


def plan_flags(config="qwen3-30b-a3b", **changes):
    flags = {
        "tensor-model-parallel-size": 2,
        "expert-model-parallel-size": 4,
        "expert-tensor-parallel-size": 1,
        "micro-batch-size": 1,
        "gpu-memory-gib": 400,
        "sglang-args": '{"mem_fraction_static": 0.9}',
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["plan", "--model-config", str(ROOT / f"launch/configs/{config}.json"), *words]


def test_a_plan_that_fits(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert cli.main(plan_flags(json=path)) == 0
    report = json.loads(path.read_text())
    assert report["passed"] and report["layout"]["world_size"] == 4
    assert report["model"]["parameters"] == 30_532_122_624
    native, http, ray, _ = report["transports"]
    assert ray["step"] == 128 * (64 * (8 + 384) + 4 * 48) < http["step"] < native["step"]
    assert report["weight_update"] == 2 * 30_532_122_624
    printed = capsys.readouterr().out
    assert "30.5 B parameters" in printed and printed.rstrip().endswith("fits") and "NO" not in printed


@pytest.mark.parametrize(
    ("flag", "size"),
    [
        ("data-parallel-size", 0),
        ("tensor-model-parallel-size", -1),
        ("context-parallel-size", 0),
        ("expert-model-parallel-size", 0),
        ("expert-tensor-parallel-size", -2),
        ("pipeline-model-parallel-size", 0),
    ],
)
def test_a_size_of_the_layout_below_one_is_named_by_its_flag(flag, size, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(plan_flags(**{flag: size}))
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"r3 plan: error: argument --{flag}") and said.endswith(f": {size} < 1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_model_parallel_size": 8}, "tp (8) does not divide num_key_value_heads (4)"),
        ({"tensor_model_parallel_size": 3}, "tp (3) does not divide num_attention_heads (32)"),
        ({"expert_model_parallel_size": 12}, "ep (12) does not divide experts (128)"),
        ({"expert_model_parallel_size": 1}, "tp (2) > 1 with ep 1 and etp 1"),
        ({"expert_tensor_parallel_size": 5}, "etp (5) does not divide moe_intermediate_size (768)"),
        ({"data_parallel_size": 3}, "etp * ep (4) does not divide tp * cp * dp (6)"),
        ({"pipeline_model_parallel_size": 5}, "pp * vpp (5 * 1) does not divide num_layers (48)"),
        ({"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 7}, "does not divide num_layers"),
        (
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "rollout_batch_size": 10}
            | {"n_samples_per_prompt": 1},
            "pp (2) does not divide the 5 micro-batches",
        ),
        ({"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tL"}, "2 layers != num_layers (48)"),
        ({"rollout_batch_size": 1, "n_samples_per_prompt": 3}, "1 * 1 * 2 (2) does not divide samples 1 * 3 (3)"),
        ({"num_steps_per_rollout": 3}, "3 * 1 * 2 (6) does not divide samples 16 * 8 (128)"),
        ({"rollout_max_response_len": 50_000}, "prompt + response (32 + 50,000) > max_position_embeddings (40,960)"),
        ({"rollout_tp_size": 3}, "tp / dp_size (3) does not divide num_attention_heads (32)"),
        ({"rollout_tp_size": 6}, "rollout tp * pp (6) and gpus per node (8): one must divide the other"),
        ({"num_nodes": 1, "rollout_num_engines": 5}, "trainer + engines (4 + 5) > nodes * gpus per node (1 * 8)"),
        ({"gpu_memory_gib": 100}, "> GPU memory (100 GiB)"),
        ({"sglang_args": '{"max_total_tokens": 20}'}, "its tokens (64) > KV slots (20)"),
        ({"sglang_args": '{"max_total_tokens": 99999999}'}, "> mem_fraction_static (0.85) of the GPU (340.0 GiB)"),
        ({"sglang_args": '{"pp_size": 2}'}, "--sglang-args pp_size (2) != --rollout-pp-size (1)"),
        ({"rollout_pp_size": 64}, "rollout pp (64) > num_layers (48)"),
        ({"sglang_args": '{"attn_cp_size": 2}'}, "2 != 1 or None: tokens of a request are on several ranks"),
        ({"sglang_args": '{"speculative_algorithm": "EAGLE"}'}, "'EAGLE' != None: rows of rejected tokens"),
        ({"sglang_args": '{"moe_runner_backend": "flashinfer_trtllm"}'}, "'flashinfer_trtllm' != another than"),
        ({"sglang_args": '{"enable_unified_memory": true}'}, "True != False or None: rows are written at kernel ids"),
        ({"sglang_args": '{"dllm_algorithm": "LowConfidence"}'}, "'LowConfidence' != None: a diffusion model"),
        ({"sglang_args": '{"max_total_token": 9}'}, "did you mean 'max_total_tokens'?"),
        ({"megatron_args": '{"cuda_graph_impl": "local"}'}, "'local' != 'none': graphs are captured"),
        ({"megatron_args": '{"moe_expert_capacity_factor": 1.5}'}, "1.5 != None: it drops tokens"),
        ({"megatron_args": '{"moe_router_load_balancing_type": "sinkhorn"}'}, "it selects experts itself"),
        (
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
            | {"megatron_args": '{"batch_p2p_comm": true}'},
            "True != False with pp 2 and vpp 2",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_operands(changes, message, capsys):
    assert cli.main(plan_flags(**changes)) == 1
    printed = capsys.readouterr()
    # Words of a cell may be on several lines of a table.
    said = " ".join((printed.out + printed.err).replace("│", " ").split())
    assert message in said and "does not fit" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 0}, "--micro-batch-size (0) < 1"),
        ({"config": "missing"}, "cannot be read"),
        ({"gpu_memory_gib": "nan"}, "--gpu-memory-gib (nan) is not a finite number above 0"),
        ({"gpu_memory_gib": -5}, "--gpu-memory-gib (-5.0) is not a finite number above 0"),
        ({"mean_response_len": 999}, "--mean-response-len (999) > --rollout-max-response-len (32)"),
        ({"sglang_args": '{"mem_fraction_static": 7}'}, "mem_fraction_static (7) is not a number between 0 and 1"),
        ({"sglang_args": '{"max_total_tokens": -1}'}, "max_total_tokens (-1) is not a whole number from 1"),
        ({"sglang_args": '{"chunked_prefill_size": "a"}'}, "chunked_prefill_size ('a') is not a whole number from 1"),
        ({"sglang_args": '{"dp_size": "x", "enable_dp_attention": true}'}, "dp_size ('x') is not a whole number"),
    ],
)
def test_wrong_use_is_refused(changes, message, capsys):
    assert cli.main(plan_flags(**changes)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "argument --sglang-args: '[]' is no JSON object, such as '{\"name\": 1}'"),
        ("{}x", "argument --sglang-args: '{}x' is no JSON: Extra data"),
    ],
)
def test_arguments_that_are_no_json_object_are_refused(text, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(plan_flags(sglang_args=text))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--r3", "--rollout-lag", "1"], "rollout lag (1) > 0: such rollouts have rows of other weights"),
        (["--rollout-lag", "-1"], "--rollout-lag (-1) < 0"),
        (["--lr", "-1"], "--lr (-1.0) is not a finite number from 0 on"),
        (["--kl-loss-coef", "nan"], "--kl-loss-coef (nan) is not a finite number"),
        (["--rollout-temperature", "-1"], "temperature -1.0 is not a finite number from 0 on"),
        (["--hf-checkpoint", "/nonexist"], "--hf-checkpoint /nonexist: no such folder"),
        (["--num-rollout", "0"], "--num-rollout (0) < 1"),
        (["--task", "nope"], "task 'nope' is none of"),
        (["--megatron-args", '{"no_such": 1}'], "'no_such' is no field of TransformerConfig"),
    ],
)
def test_what_the_loop_refuses_of_flags_the_plan_refuses_too(flags, message, capsys):
    assert cli.main([*plan_flags(), *flags]) == 1
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert message in said and "does not fit" in said


def test_rollouts_may_be_ahead_where_their_rows_are_kept(capsys):
    assert cli.main([*plan_flags(), "--r3", "--rollout-lag", "1", "--r3-staleness", "keep"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("fits")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"dtype": "float32"}, None),
        ({"num_experts": 64}, "num_experts (64) != 128 of --model-config"),
        ({"num_hidden_layers": 47}, "num_layers (47) != 48 of --model-config"),
        ({"hidden_size": 1024}, "hidden_size (1024) != 2048 of --model-config"),
        ({"mlp_only_layers": [0]}, "layer_ids"),
        ({"intermediate_size": 4096}, None),
        ({"moe_intermediate_size": 512}, "layer 0:"),
        ({"model_type": "qwen2_moe", "head_dim": 128}, "family ('qwen2_moe') != 'qwen3_moe'"),
        (None, "no *.safetensors in it"),
    ],
)
def test_a_checkpoint_must_be_of_the_model_that_is_planned(changes, message, tmp_path, capsys):
    if changes is not None:
        (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(QWEN | (changes or {})))
    code = cli.main([*plan_flags(), "--hf-checkpoint", str(tmp_path)])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (code, "does not fit: checkpoint" in said) == ((0, False) if message is None else (1, True))
    assert message is None or message in said


def dry_run(script, *flags, **variables):
    command = Path(sys.executable).parent / "r3"
    if not command.exists():
        pytest.skip("needs the r3 command beside the interpreter")
    return subprocess.run(
        [ROOT / f"launch/{script}.sh", *flags],
        env=os.environ | {"DRY_RUN": "1", "R3": str(command)} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("script", ["qwen3-30b-a3b", "qwen3-235b-a22b"])
def test_scripts_for_real_models_fit_their_machines(script):
    done = dry_run(script, "--seed", "7", "--save-interval", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launch/grpo.py" in done.stdout and "--seed 7" in done.stdout
    assert f"{ModelShape.from_config(CONFIGS[script]).num_parameters() / 1e9:.1f} B parameters" in done.stdout


def test_a_model_that_cannot_be_started_is_planned_and_not_said_to_fit():
    done = dry_run("deepseek-v3")
    said = " ".join(done.stdout.replace("│", " ").split())
    assert done.returncode == 1, done.stdout + done.stderr
    assert "671.0 B parameters" in said and "Model states of a trainer's rank" in said
    assert "model_type 'deepseek_v3' != 'qwen3_moe'" in said and "multi-head latent attention" in said
    assert "cannot be started" in said and "would run" not in said and ": fits" not in said


def test_a_dry_run_looks_at_the_checkpoint_that_is_given():
    done = dry_run("qwen3-30b-a3b", HF_CHECKPOINT="/nonexist")
    assert done.returncode == 1 and "would run" not in done.stdout
    assert "--hf-checkpoint /nonexist: no such folder" in done.stdout
