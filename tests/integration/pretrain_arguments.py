"""What launch/pretrain_r3.py makes of each argument of megatron.training, as JSON; Megatron's imports change torch.

Each argument of a model or of its data is given another value than its default beside several sets of others, since
some are read only there. The answer is the most that any of these shows: "refused" by the script or by replay, what
"changes" in the configuration that the model is built from, "raises" what Megatron says against it, or "nothing".
Some models are built, too: their modules say what became of arguments.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import tempfile
from typing import Any

from r3_adapter.arguments import add_r3_offline_arguments
from r3_adapter.errors import R3Error
from r3_adapter.megatron import cpu
from r3_adapter.megatron.pretrain_model import model_config
from r3_adapter.megatron.pretrain_options import check_arguments, refused_arguments

COMMON = """
    --num-layers 8 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 128
    --max-position-embeddings 256 --vocab-size 512 --num-experts 8 --moe-ffn-hidden-size 32 --moe-router-dtype fp32
    --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none --micro-batch-size 1 --train-iters 2
    --lr 1e-4 --normalization RMSNorm --tokenizer-type NullTokenizer --transformer-impl local --r3 --r3-traces x
    --no-persist-layer-norm --no-gradient-accumulation-fusion
"""
GROUPED = (
    "--group-query-attention --num-query-groups 2 --kv-channels 16 --position-embedding-type rope --no-rope-fusion"
)
SETS = (
    f"{GROUPED} --swiglu --disable-bias-linear --no-bias-swiglu-fusion",
    f"{GROUPED} --bf16 --use-distributed-optimizer --no-masked-softmax-fusion --no-bias-gelu-fusion",
    "--position-embedding-type learned_absolute",
    "--position-embedding-type yarn",
    "--multi-latent-attention --position-embedding-type rope --no-rope-fusion --rope-type yarn",
    f"{GROUPED} --disable-bias-linear --tp 2 --sequence-parallel --pp 2 --ep 2 --vpp 2 --bf16",
    f"{GROUPED} --mtp-num-layers 1 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    f"{GROUPED} --moe-router-score-function sigmoid --moe-router-num-groups 4 --recompute-granularity selective",
)
"""Of flags, each with what some arguments depend on."""

GROUPS = """
    transformer configuration;network size;moe;mla;experimental_attention_variant;heterogeneous architecture
    experimental;Transformer-Engine;biencoder;vision;rl;sft;data and dataloader
"""
"""Titles of the groups of arguments that are about a model or its data."""

VALUES: dict[str, Any] = {
    "window_size": (8, 0),
    "window_attn_skip_freq": 2,
    "no_rope_freq": 4,
    "moe_layer_freq": 2,
    "linear_attention_freq": 2,
    "moe_router_group_topk": 1,
    "spec": ["megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec"],
    "pipeline_model_parallel_layout": "Ett|tt|tt|ttL",
    "decoder_first_pipeline_num_layers": 2,
    "decoder_last_pipeline_num_layers": 2,
    "tp_comm_overlap": True,
    "recompute_granularity": "selective",
}
"""Values of arguments that take no other value at random."""


def main() -> None:
    cpu.install_training()
    os.environ.update(RANK="0", WORLD_SIZE="8", CUDA_DEVICE_MAX_CONNECTIONS="1")
    from megatron.training import arguments

    parser = add_r3_offline_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    sets = [parser.parse_args(f"{COMMON} {each}".split()) for each in SETS]
    begins = [fields(each) for each in sets]
    titles = {title.strip() for title in GROUPS.strip().replace("\n", ";").split(";")}
    answers = {}
    for group in parser._action_groups:
        for action in group._group_actions if group.title in titles else ():
            answers[action.option_strings[0]] = best = ["nothing", ""]
            for given, begin in zip(sets, begins, strict=True):
                found = answer(parser, action, given, begin)
                best[:] = found if best[0] == "nothing" else best
                if found[0] in ("refused", "changes"):
                    best[:] = found
                    break
    print(json.dumps({"answers": answers, "modules": modules(parser)}))


def modules(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Return the names of modules and the sizes of buffers of models that are built of some arguments."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder

    from r3_adapter.layout import ParallelLayout
    from r3_adapter.megatron.policy_trainer.build import initialize

    built = {}
    with tempfile.TemporaryDirectory() as folder:
        initialize(ParallelLayout(), 0, f"file://{folder}/rendezvous")
        groups = ProcessGroupCollection.use_mpu_process_groups()
        for flags in ("", "--rotary-percent 0.5", "--mtp-num-layers 1", "--use-rope-scaling --rope-scaling-factor 2"):
            given = parser.parse_args(f"{COMMON} {SETS[0]} --use-cpu-initialization {flags}".split())
            model = GPTModelBuilder(config_of(given)).build_model(groups)
            frequencies = model.rotary_pos_emb.inv_freq
            kinds = sorted({f"{name.split('.')[0]} {type(module).__name__}" for name, module in model.named_modules()})
            built[flags] = [str(len(frequencies)), str(frequencies.sum().item()), *kinds]
    return built


def answer(
    parser: argparse.ArgumentParser, action: argparse.Action, given: argparse.Namespace, begin: dict[str, str]
) -> tuple[str, str]:
    """Return what an argument does beside others, and with what."""
    given = copy.copy(given)
    value = other(action, getattr(given, action.dest))
    setattr(given, action.dest, value)
    if mine := [why for flag, _, why in refused_arguments(parser, given) if flag in action.option_strings]:
        return "refused", mine[0]
    try:
        found = fields(given)
    except R3Error as error:
        return "refused", str(error)
    except (
        AssertionError,
        ValueError,
        TypeError,
        RuntimeError,
        KeyError,
        AttributeError,
        OSError,
        SystemExit,
    ) as error:
        return "raises", f"{type(error).__name__}: {error}"
    changed = [name for name in found if found[name] != begin.get(name)]
    return ("changes", " ".join(changed)) if changed else ("nothing", "")


def fields(given: argparse.Namespace) -> dict[str, str]:
    """Return all that Megatron's builder gets to build the model from, as text.

    Raises:
        R3Error: what the script refuses.
    """
    model = config_of(given)
    return {name: repr(value) for name, value in [*vars(model.transformer).items(), *vars(model).items()]}


def config_of(given: argparse.Namespace) -> Any:
    """Return the configuration that the script makes of arguments.

    Raises:
        R3Error: what the script refuses.
    """
    from megatron.training import arguments

    given = copy.deepcopy(given)
    given.rank, given.world_size, given.params_dtype = 0, 8, None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        arguments.validate_args(given, {"dataloader_type": "external"})
        # With the vocabulary of a tokenizer.
        given.padded_vocab_size = given.vocab_size
        model = model_config(given)
    check_arguments(given, model.transformer)
    return model


def other(action: argparse.Action, value: Any) -> Any:
    """Return another value of an argument."""
    if action.dest in VALUES:
        return VALUES[action.dest]
    if isinstance(action, argparse._StoreTrueAction | argparse._StoreFalseAction):
        return action.const
    if isinstance(action, argparse.BooleanOptionalAction):
        return not value
    if action.choices:
        found = next(each for each in action.choices if each != value)
    elif action.type is int:
        found = 2 * value if isinstance(value, int) and value else 2
    elif action.type is float:
        found = value / 2 if value else 0.25
    else:
        found = "x"
    return [found] if action.nargs else found


if __name__ == "__main__":
    main()
