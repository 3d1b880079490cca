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
    [({"micro_batch_size": 0}, "--micro-batch-size (0) < 1"), ({"config": "missing"}, "cannot be read")],
)
def test_wrong_use_is_refused(changes, message, capsys):
    assert cli.main(plan_flags(**changes)) == 2
    assert message in capsys.readouterr().err


def test_arguments_that_are_no_json_object_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(plan_flags(sglang_args="[]"))
    assert stopped.value.code == 2 and "--sglang-args" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3"])
def test_scripts_for_real_models_fit_their_machines(script):
    command = Path(sys.executable).parent / "r3"
    if not command.exists():
        pytest.skip("needs the r3 command beside the interpreter")
    done = subprocess.run(
        [ROOT / f"launch/{script}.sh", "--seed", "7"],
        env=os.environ | {"DRY_RUN": "1", "R3": str(command)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launch/grpo.py" in done.stdout and "--seed 7" in done.stdout
    assert f"{ModelShape.from_config(CONFIGS[script]).num_parameters() / 1e9:.1f} B parameters" in done.stdout
