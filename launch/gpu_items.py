"""What launch/gpu.py asks a machine with GPUs: an item a question, in the order of their worth."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GPU_TESTS = "R3_GPU_TESTS"
"""An environment variable: "rehearse" lets the tests that are marked gpu run on a CPU."""
ENGINES = ("sglang", "megatron-core")
EP2 = ("--ep", "2")
ROUTES = ("--r3", "--r3-staleness", "keep", "--rollout-lag", "1")


@dataclass(frozen=True)
class Item:
    """A question, and the command that answers it; see `command_of` for its words.

    asks: the question, for readers.
    stage: items of one stage run side by side, so those that measure time are alone in theirs.
    limit: seconds.
    needs: distributions that must be installed.
    gpus: how many the command takes at least.
    variables: environment variables that must be set, as a checkpoint's folder.
    engine: arguments of SGLang beside the machine's own, for a command with --sglang-args; None for one without.
    shows: what is said of the figures: a word for each, and where it lies in the command's JSON, as "a/b".
    rehearsal: the words to add on a machine without a GPU, where all is smaller; those of `command` that end in one
        of its flags give way. None: the same words.
    """

    name: str
    asks: str
    stage: str
    command: tuple[str, ...]
    limit: int
    needs: tuple[str, ...] = ENGINES
    gpus: int = 1
    variables: tuple[str, ...] = ()
    engine: Mapping[str, Any] | None = None
    shows: Mapping[str, str] = field(default_factory=dict)
    rehearsal: tuple[str, ...] | None = None


def prove(name: str, asks: str, *words: str, limit: int = 120, stage: str = "", **more: Any) -> Item:
    """Return a self-test, whose own sentence says what was found."""
    command = ("r3", "prove", *words, "--json", "{json}")
    return Item(name, asks, stage or name, command, limit, **more)


def tests(name: str, asks: str, path: str, *words: str, limit: int, stage: str = "", **more: Any) -> Item:
    """Return the tests of a file that are marked gpu."""
    return Item(name, asks, stage or name, ("pytest", "-m", "gpu", path, *words), limit, **more)


ITEMS: tuple[Item, ...] = (
    Item("installed", "Is the installation whole?", "installed", ("r3", "doctor"), 30, needs=()),
    tests(
        "router",
        "Do routers, fused and not, use the experts that they are given, on the GPU and under a CUDA graph, and does a "
        "step with its own routes keep its bits?",
        "tests/integration/test_gpu_megatron.py",
        limit=170,
        stage="right",
        needs=("megatron-core",),
    ),
    prove(
        "prove-float32",
        "Does each route reach its token, layer and expert in float32, with CUDA graphs and overlap scheduling on?",
        limit=170,
        stage="right",
        engine={},
    ),
    prove(
        "prove-bfloat16",
        "And in bfloat16, and what share of single misplaced routes would be seen?",
        *("--dtype", "bfloat16"),
        limit=170,
        stage="right",
        engine={},
    ),
    tests(
        "capture",
        "Has a greedy request the same routes with CUDA graphs and overlap scheduling on and off, with pages of "
        "several tokens, with the radix cache, and through shared memory?",
        "tests/integration/test_gpu_sglang.py",
        limit=170,
        stage="right",
        needs=("sglang",),
    ),
    tests(
        "perturb",
        "Does the self-test's perturbation choose other experts in each replay of a CUDA graph, as without one?",
        "tests/unit/test_perturb.py",
        limit=170,
        stage="right",
        needs=("sglang",),
    ),
    tests(
        "kernels",
        "Do the kernels of Mamba and of gated delta nets compute what plain torch does without a GPU, packed too?",
        "tests/integration/test_gpu_kernels.py",
        limit=170,
        stage="right",
        needs=("megatron-core", "mamba-ssm", "causal-conv1d", "flash-linear-attention"),
    ),
    Item(
        "server",
        "Is a server in bfloat16 that runs already proved by its natural differences (`r3 prove --url`)?",
        "right",
        ("pytest", "tests/integration/test_prove_server.py", "-k", "server_is_proved"),
        170,
    ),
    Item(
        "capture-cost",
        "What does capture cost an engine of Qwen3-30B-A3B's shape: tokens a second, prefill, the slowest token?",
        "capture-cost",
        (
            *("r3", "bench", "capture", "--device", "cuda", "--shape", "qwen3-30b-a3b", "--layers", "12"),
            *("--pairs", "3", "--json", "{json}"),
        ),
        180,
        needs=("sglang",),
        engine={},
        shows={
            "tokens a second over capture off": "patched_over_off",
            "over released capture": "patched_over_native",
            "prefill over off": "prefill_over_off",
            "slowest tokens of a stream over off": "itl_p99_over_off",
            "scheduler, ms a request of 1,024 tokens": "scheduler_ms_per_request_1024",
            "of 8,192": "scheduler_ms_per_request_8192",
        },
        rehearsal=("--device", "cpu", "--shape", "tiny", "--layers", "2", "--pairs", "2"),
    ),
    Item(
        "replay-cost",
        "What does replay cost a router, a layer and a step of Qwen3-30B-A3B's shape, over live routing?",
        "replay-cost",
        (
            *("r3", "bench", "replay", "--device", "cuda", "--shape", "qwen3-30b-a3b", "--layers", "4"),
            *("--pairs", "7", "--json", "{json}"),
        ),
        100,
        needs=("megatron-core",),
        shows={
            "over live with TransformerEngine's router, on the device: router of 8,192 tokens": (
                "router 8192/replay/device_over_live_fused/median"
            ),
            "of 65,536": "router 65536/replay/device_over_live_fused/median",
            "layer": "layer/replay/device_over_live_fused/median",
            "step": "step/replay/device_over_live_fused/median",
            "with launches, step": "step/replay/over_live_fused/median",
            "step over live with the unfused router": "step/replay/device_over_live/median",
        },
        rehearsal=(
            *("--device", "cpu", "--shape", "tiny", "--layers", "1", "--pairs", "2"),
            *("--tokens", "64", "--router-tokens", "64"),
        ),
    ),
    Item(
        "loop",
        "Does the loop train on one GPU that engine and trainer share, with rows of two versions of the weights?",
        "loop",
        (
            *("python", "launch/grpo.py", "--save", "{folder}", "--num-rollout", "3", "--gpus-per-rank", "0.5"),
            *("--rollout-batch-size", "4", "--sft-steps", "20", *ROUTES),
        ),
        110,
        needs=(*ENGINES, "ray"),
        engine={},
        rehearsal=("--gpus-per-rank", "0", "--num-rollout", "1"),
    ),
    prove(
        "prove-pages",
        "Is replay right with samples of one prompt, and with KV pages of 16 tokens?",
        *("--group", "8"),
        limit=110,
        stage="loop",
        engine={"page_size": 16},
    ),
    prove(
        "prove-model",
        "Is replay right in the first layers of your own checkpoint's shape, at its widths and in its dtype?",
        *("--model", "{checkpoint}", "--layers", "4", "--real-sizes", "--dtype", "auto"),
        limit=300,
        variables=("HF_CHECKPOINT",),
        engine={},
        rehearsal=("--model", "qwen3_moe"),
    ),
    prove("nccl-ep2", "Is replay right where two ranks share the experts out over NCCL?", *EP2, gpus=2, engine={}),
    prove("nccl-tp2", "And where they share attention too?", "--tp", "2", *EP2, "--etp", "1", gpus=2, engine={}),
    prove("nccl-pp2", "And in two pipeline stages?", "--pp", "2", gpus=2, engine={}),
    prove("nccl-cp2", "And where they share sequences out?", "--cp", "2", gpus=2, engine={}),
    prove("engine-tp2", "Is capture right in an engine of two tensor-parallel ranks?", gpus=2, engine={"tp_size": 2}),
    prove("engine-pp2", "And in one of two pipeline stages, over NCCL?", gpus=2, engine={"pp_size": 2}),
    prove(
        "engine-eplb",
        "And in one whose ranks hold some experts twice (EPLB)?",
        gpus=2,
        engine={"tp_size": 2, "ep_size": 2, "ep_num_redundant_experts": 2},
    ),
    tests(
        "bits-ranks",
        "Does a step with its own routes keep its bits over NCCL, with sigmoid routers, shared experts and MTP?",
        "tests/integration/test_gpu_ranks.py",
        *("-k", "bit"),
        limit=180,
        needs=("megatron-core",),
        gpus=2,
    ),
    tests(
        "families",
        "Do routes replay of families whose layers have kernels of other packages: gated delta nets, Mamba?",
        "tests/integration/test_gpu_families.py",
        limit=240,
        needs=(*ENGINES, "megatron-bridge", "mamba-ssm", "causal-conv1d", "flash-linear-attention"),
        gpus=2,
    ),
    tests(
        "deepep",
        "Do DeepEP's dispatchers send tokens to the experts that they are given?",
        "tests/integration/test_gpu_ranks.py",
        *("-k", "deepep"),
        limit=180,
        needs=(*ENGINES, "deep-ep"),
        gpus=2,
    ),
    Item(
        "loop-2",
        "Does the loop train on two GPUs, weights going from rank to engine?",
        "loop-2",
        (
            *("python", "launch/grpo.py", "--save", "{folder}", "--num-rollout", "4", "--gpus-per-rank", "1"),
            *("--rollout-batch-size", "4", "--sft-steps", "20", *ROUTES),
        ),
        180,
        needs=(*ENGINES, "ray"),
        gpus=2,
        engine={},
        rehearsal=("--gpus-per-rank", "0", "--num-rollout", "1"),
    ),
    Item(
        "launcher",
        "Does a real model's launcher (MODEL=qwen3-30b-a3b) train on one GPU, with 4 layers of random weights, "
        "and go on from its checkpoint?",
        "launcher",
        ("bash", "launch/walk.sh"),
        300,
        needs=(*ENGINES, "ray"),
        # Longer than the ten minutes of one GPU have room for: asked by name.
        variables=("MODEL",),
        engine={"max_total_tokens": 8192, "max_running_requests": 16, "mem_fraction_static": 0.4},
    ),
    Item(
        "model",
        "Does GRPO on Qwen3-30B-A3B run on 8 GPUs, and what is its k3 KL?",
        "model",
        ("bash", "launch/qwen3-30b-a3b.sh", "--num-rollout", "2", "--rollout-max-response-len", "4096"),
        1800,
        needs=(*ENGINES, "ray"),
        gpus=8,
        variables=("HF_CHECKPOINT",),
    ),
    Item(
        "model-pp2",
        "And with engines of two pipeline stages over NCCL?",
        "model-pp2",
        (
            *("bash", "launch/qwen3-30b-a3b.sh", "--rollout-pp-size", "2", "--rollout-tp-size", "1"),
            *("--num-rollout", "2", "--rollout-max-response-len", "4096"),
        ),
        1800,
        needs=(*ENGINES, "ray"),
        gpus=8,
        variables=("HF_CHECKPOINT",),
    ),
)


def command_of(item: Item, folder: Path, machine: Mapping[str, Any] | None = None, *, rehearse: bool) -> list[str]:
    """Return the words of a command, of which the first is a program.

    folder: {json} and {folder} are paths below it; {checkpoint} is the environment's HF_CHECKPOINT.
    machine: the arguments of SGLang that this machine needs.
    """
    words = list(item.command)
    if rehearse and item.rehearsal is not None:
        words = replaced(words, item.rehearsal)
    programs = {
        # -P: a checkout that is not built must not hide the installed package.
        "r3": [sys.executable, "-P", "-m", "r3_adapter.cli"],
        "pytest": [sys.executable, "-P", "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"],
        "python": [sys.executable],
        "bash": ["bash"],
    }
    paths = {
        "{checkpoint}": os.environ.get("HF_CHECKPOINT", ""),
        "{json}": str(folder / f"{item.name}.json"),
        "{folder}": str(folder / item.name),
    }
    words = [*programs[words[0]], *(paths.get(word, word) for word in words[1:])]
    # In a rehearsal the engine is as SGLang runs on a CPU.
    if not rehearse and item.engine is not None and (engine := {**(machine or {}), **item.engine}):
        words += ["--sglang-args", json.dumps(engine)]
    return words


def replaced(words: list[str], others: tuple[str, ...]) -> list[str]:
    """Return the words with those flags, and their values, in place of the ones of the same name."""
    flags, kept, skip = {word for word in others if word.startswith("--")}, list[str](), False
    for word in words:
        if word.startswith("--"):
            skip = word in flags
        if not skip:
            kept.append(word)
    return [*kept, *others]
