"""Checks of launch/pretrain_r3.sh before it starts a rank; arguments: the folders of the rollouts and the checkpoint.

Prints Megatron's flags of the checkpoint's model, a word a line, or says in a line what is missing and ends with exit
code 2.
"""

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from r3_adapter.errors import R3Error
from r3_adapter.signals import say
from r3_adapter.trace import RoutingTrace


def main() -> int:
    """Check the environment, the rollouts and the checkpoint; print the flags."""
    traces, checkpoint = map(Path, sys.argv[1:])
    try:
        check_environment()
        hf = check_folders(traces, checkpoint)
        print("\n".join(model_flags(hf)))
    except R3Error as error:
        say(f"pretrain_r3: {error}")
        return 2
    return 0


def check_environment() -> None:
    """Refuse an interpreter that lacks Megatron's training loop, or whose Megatron-core is not patched.

    Raises:
        R3Error: says what to do.
    """
    from r3_adapter.patch import packages
    from r3_adapter.patch.packages import State

    if find_spec("megatron") is None or find_spec("megatron.training") is None:
        raise R3Error(
            f"{sys.executable} has no megatron.training, which comes with megatron-core from 0.17 on: set PYTHON to "
            "the interpreter of an environment that has it (PYTHON=python3.12 launch/test.sh makes .venv-3.12)"
        )
    (found,) = packages.status(["megatron-core"])
    if found.state is not State.APPLIED:
        raise R3Error(packages.explain(found))


def check_folders(traces: Path, checkpoint: Path) -> Mapping[str, Any]:
    """Return the checkpoint's config.json, once it is known that the first of the rollouts is of such a model.

    Raises:
        R3Error: a folder that is missing or holds something else, or sizes that differ, with both operands.
    """
    from r3_adapter.megatron.policy_trainer.checkpoint import Checkpoint
    from r3_adapter.rollout import sample_folders

    for folder in (traces, checkpoint):
        if not folder.is_dir():
            raise R3Error(f"{folder}: no such folder")
    with Checkpoint(checkpoint) as opened:
        hf = opened.config
    samples = sample_folders([traces])[0]
    check_same_model(samples[0].trace, hf, f"{samples.folder}: sample 0", checkpoint)
    return hf


def check_same_model(trace: RoutingTrace, hf: Mapping[str, Any], place: str, checkpoint: Path) -> None:
    """Refuse a trace of another model than the checkpoint's, as far as their sizes say.

    Raises:
        R3Error: names the size, with both operands.
    """
    found = {"num_experts": trace.num_experts, "num_experts_per_tok": trace.topk}
    if trace.model is not None:
        model = trace.model
        found |= {"num_hidden_layers": model.num_layers, "hidden_size": model.hidden_size}
        found |= {"vocab_size": model.vocab_size}
    sizes = {**hf, "num_experts": hf.get("num_experts") or hf.get("num_local_experts")}
    for name, size in found.items():
        if (want := sizes.get(name)) != size:
            raise R3Error(
                f"{place}: {name} ({size}) of its model != {want} of {checkpoint}, which it was not rolled out with"
            )


def model_flags(hf: Mapping[str, Any]) -> list[str]:
    """Return the arguments of megatron.training that say what a Qwen3-MoE config.json says.

    Raises:
        R3Error: another kind of model, or a feature that is not translated.
    """
    from r3_adapter.megatron.policy_trainer.build import check_translated, layer_pattern, rope_of

    check_translated(hf)
    numbers: dict[str, Any] = {
        "num-layers": hf["num_hidden_layers"],
        "hidden-size": hf["hidden_size"],
        "ffn-hidden-size": hf["intermediate_size"],
        "num-attention-heads": hf["num_attention_heads"],
        "num-query-groups": hf["num_key_value_heads"],
        "kv-channels": hf["head_dim"],
        "norm-epsilon": hf["rms_norm_eps"],
        "rotary-base": int(rope_of(hf)["rope_theta"]),
        "vocab-size": hf["vocab_size"],
        "make-vocab-size-divisible-by": 1,
        "max-position-embeddings": hf["max_position_embeddings"],
        "num-experts": hf.get("num_experts") or hf["num_local_experts"],
        "moe-ffn-hidden-size": hf["moe_intermediate_size"],
        "moe-router-topk": hf["num_experts_per_tok"],
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
    }
    if not all(pattern := layer_pattern(hf)):
        numbers["moe-layer-freq"] = pattern
    switches = ["group-query-attention", "qk-layernorm", "swiglu", "disable-bias-linear"]
    if not hf["tie_word_embeddings"]:
        switches.append("untie-embeddings-and-output-weights")
    if not hf["norm_topk_prob"]:
        switches.append("moe-router-pre-softmax")
    words = [word for name, value in numbers.items() for word in (f"--{name}", str(value).replace(" ", ""))]
    return [*words, *(f"--{name}" for name in switches)]


if __name__ == "__main__":
    sys.exit(main())
