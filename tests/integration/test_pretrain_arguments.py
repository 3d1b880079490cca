"""No argument of Megatron's about a model or its data is dropped in silence by launch/pretrain_r3.py."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(
        find_spec("megatron") is None or find_spec("megatron.training") is None,
        reason="this Megatron-core has no megatron.training",
    ),
]

SCRIPT = Path(__file__).with_name("pretrain_arguments.py")

# The script reads the first line itself; the others are not about the model, or read beside another argument alone.
_NOTHING = """
    --seq-length --num-workers --dataloader-inter-document-masking --no-create-attention-mask-in-dataloader
    --sequence-parallel --inference-cuda-graph-scope --yarn-correction-range-round-to-int --enable-experimental
    --use-precision-aware-optimizer --main-grads-dtype --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype
    --megatron-fsdp-main-params-dtype --megatron-fsdp-main-grads-dtype --megatron-fsdp-grad-comm-dtype
    --megatron-fsdp-enable-fine-grained-param-gather --megatron-fsdp-max-pool-double-buffer
    --fsdp-db-use-persist-buf-on-alloc-fail
"""
# Megatron itself says no: without TransformerEngine or a GPU, or without another argument.
_RAISES = """
    --hierarchical-context-parallel-sizes --hybrid-context-parallel --delay-wgrad-compute
    --overlap-dispatch-backward-with-experts-wgrad --ep-overlap-early-attn-memory-release
    --defer-embedding-wgrad-compute --qk-clip --experimental-attention-variant --distribute-saved-activations
    --fp8-format --fp8-output-proj --fp4-format --moe-router-padding-for-quantization --moe-router-padding-for-fp8
    --moe-grouped-gemm --moe-single-grouped-weight --moe-single-grouped-bias --moe-enable-deepep
    --moe-pad-expert-input-to-capacity --moe-permute-fusion --moe-expert-rank-capacity-factor --batch-invariant-mode
    --symmetric-ar-type --inference-fuse-tp-communication --inference-disable-triton-nvls-kernels
    --fine-grained-activation-offloading --moe-paged-stash --encoder-num-layers --use-rotary-position-embeddings
    --encoder-seq-length --fp4-param-gather --fp8-param-gather --te-precision-config-file
"""
CHANGES = {
    "--rotary-percent": "rotary_percent",
    "--use-rope-scaling": "rope_scaling",
    "--rope-scaling-factor": "rope_scaling_factor",
    "--rotary-seq-len-interpolation-factor": "seq_len_interpolation_factor",
    "--spec": "transformer_layer_spec",
    "--mtp-num-layers": "mtp_num_layers",
    "--window-size": "window_size",
}
REFUSED = {
    "--hybrid-layer-pattern": "this loop builds a GPTModel",
    "--moe-enable-routing-replay": "moe_enable_routing_replay (True) != False: it selects experts itself",
    "--mock-data": "samples are those of --r3-traces",
    "--sft": "--dataloader-inter-document-masking packs samples",
    "--perform-rl-step": "train_rl.py",
    "--overlap-moe-expert-parallel-comm": "without the rollout's temperatures",
    "--openai-gelu": "builder of GPT models does not look at it",
}


@pytest.fixture(scope="module")
def found() -> Any:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_each_argument_changes_the_model_or_is_refused(found: Any) -> None:
    answers = found["answers"]
    nothing, raises = _NOTHING.split(), _RAISES.split()
    assert len(answers) > 400
    assert {flag for flag, (answer, _) in answers.items() if answer == "nothing"} <= {*nothing}
    assert {flag: why for flag, (answer, why) in answers.items() if answer == "raises" and flag not in raises} == {}
    for flag, field in CHANGES.items():
        assert answers[flag][0] == "changes" and field in answers[flag][1].split(), flag
    for flag, why in REFUSED.items():
        assert answers[flag][0] == "refused" and why in answers[flag][1], flag


def test_the_built_model_has_what_the_arguments_ask(found: Any) -> None:
    """Half of the head turned, frequencies scaled, and a layer of multi-token prediction with experts."""
    plain, half, mtp, scaled = found["modules"].values()
    assert (plain[0], half[0]) == ("8", "4")
    assert mtp[:2] == plain[:2] and scaled[0] == plain[0] and scaled[1] != plain[1]
    assert "mtp TopKRouter" in mtp and "mtp LocalAttention" in mtp and not any("mtp" in each for each in plain)
