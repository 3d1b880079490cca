"""A running SGLang server for tests, and Hugging Face's model, which replays the routes of its replies."""

import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter import processes
from r3_adapter.patch import packages
from r3_adapter.patch.series import load_series
from r3_adapter.proof.prove import ADMIT_ALL
from r3_adapter.sglang.capture import computations_from_reply
from r3_adapter.sglang.computation import Computation
from r3_adapter.sglang.cpu import cpu_environment, has_gpu
from r3_adapter.sglang.perturb import VARIABLE, Perturbation
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.sglang.shared import fetch_payload
from r3_adapter.trace import RoutingTrace

LAYERS, VOCAB = 4, 512
EXACT = 1e-4
TIMEOUT = 300
CHUNK, POOL = 256, 700
"""Tokens of a prefill chunk and KV slots of `serve_strained`: requests are cut, retracted and computed again."""


def _release() -> str:
    try:
        return distribution("sglang").version
    except PackageNotFoundError:
        return ""


if _release() not in [series.version for series in load_series().get("sglang", ())]:
    pytest.skip("sglang is not installed in a version with patches", allow_module_level=True)


class Reference:
    """HF's model with the weights of a checkpoint; replays a trace's routes."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import Qwen3MoeForCausalLM

        self.torch, self.trace = torch, None
        self.model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for layer in range(LAYERS):
            self.model.model.layers[layer].mlp.gate.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Callable[[Any, Any, Any], Any]:
        def route(module: Any, args: Any, output: Any) -> Any:
            probs, ids = output[0].softmax(dim=-1), output[2].clone()
            ids[:-1] = self.torch.from_numpy(self.trace.topk_ids[:-1, layer].astype(np.int64))
            weights = probs.gather(1, ids)
            return output[0], weights / weights.sum(dim=-1, keepdim=True), ids

        return route

    def logprobs(self, trace: RoutingTrace) -> Any:
        """Return [S - 1] the log-probability of each token but the first."""
        self.trace = trace
        tokens = self.torch.from_numpy(trace.token_ids.astype(np.int64))[None]
        with self.torch.no_grad():
            logprobs = self.model(tokens).logits[0].log_softmax(dim=-1)
        return logprobs[:-1].gather(1, tokens[0, 1:, None])[:, 0].numpy()


class Server:
    """A running server and the requests to it.

    pauses: whether it computes nothing while generation is paused; SGLang's pipeline goes on, and retracts some only.
    """

    def __init__(self, url: str, weights: Mapping[str, Path], settings: EngineSettings) -> None:
        shared = settings.extra.get("routed_experts_dir")
        self.url, self.weights, self.shared_memory = url, weights, None if shared is None else Path(shared)
        self.pauses = settings.pp_size == 1
        self.references = {name: Reference(folder) for name, folder in weights.items()}

    def open(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT)

    def post(self, path: str, body: Any) -> Any:
        with self.open(path, body) as answer:
            return json.loads(answer.read() or "null")

    def ask(self, prompts: Any, length: int | None, **options: Any) -> Any:
        sampling = {"temperature": 1.0, "max_new_tokens": length, "ignore_eos": True}
        wanted = {"return_logprob": True, "return_routed_experts": True, "sampling_params": sampling}
        replies = self.post("/generate", {"input_ids": prompts, **wanted, **options})
        if (folder := self.shared_memory) is None:
            return replies
        if isinstance(replies, list):
            return [fetch_payload(reply, folder, "reply") for reply in replies]
        return fetch_payload(replies, folder, "reply")

    def worst(self, reply: Any, prompt: Sequence[int], found: Sequence[Computation]) -> float:
        """Return the largest difference of an output token's log-probability from the reference's."""
        want = np.array([pair[0] for pair in reply["meta_info"]["output_token_logprobs"]])
        assert len(want) == len(reply["output_ids"])
        start, worst = len(prompt), [0.0]
        for computation in found:
            (version,) = computation.trace.weight_versions
            got = self.references[base_name(version)].logprobs(computation.trace)
            assert (computation.sampled_start or len(prompt)) == start
            span = slice(start - len(prompt), computation.stop - len(prompt))
            worst.append(np.abs(got[start - 1 :] - want[span]).max(initial=0))
            start = computation.stop
        assert start == len(prompt) + len(want)
        return float(max(worst))

    def check(self, reply: Any, prompt: Sequence[int], **options: Any) -> list[Computation]:
        found = computations_from_reply(reply, prompt, **options)
        assert self.worst(reply, prompt, found) <= EXACT
        return found


def base_name(version: str) -> str:
    """Return what weights were asked for as, whose name has a number if it had been in use."""
    return version.partition("#")[0]


def write_checkpoint(folder: Path, seed: int) -> Path:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    more = {"num_hidden_layers": LAYERS, "max_position_embeddings": 1024, "initializer_range": 0.2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen3MoeConfig(**sizes, **heads, **experts, **more, dtype=torch.float32)
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write one whose token 7 is the word t7, and a chat template of nothing but words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(3, VOCAB))]
    words = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)


def patched_site(folder: Path) -> Path | None:
    """Return a folder for PYTHONPATH with the patched SGLang; None if it is installed so."""
    if all(found.state is packages.State.APPLIED for found in packages.status(["sglang"])):
        return None
    installed = distribution("sglang")
    for name in sorted({file.parts[0] for file in installed.files or () if file.parts[0].startswith("sglang")}):
        shutil.copytree(Path(str(installed.locate_file(name))), folder / name, copy_function=os.symlink)
    packages.apply(["sglang"], site=folder)
    return folder


def command(settings: EngineSettings) -> list[str]:
    command = [sys.executable, "-m", "sglang.launch_server"]
    for name, value in settings.engine_arguments(gpu=has_gpu()).items():
        if value is None or value is False:
            continue
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return command


def environment_of(folder: Path) -> dict[str, str]:
    """Return the variables of a process with the patched SGLang."""
    environment = {**os.environ, **cpu_environment(), "HF_HUB_OFFLINE": "1"}
    paths = [str(patched_site(folder / "site") or ""), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


@contextmanager
def serve(folder: Path, weights: Mapping[str, Path], settings: EngineSettings) -> Iterator[Server]:
    """Run a server on the loopback; its log goes to a file of the folder.

    weights: folders of checkpoints by the name of their version; the first one is loaded.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = replace(settings, extra={"host": "127.0.0.1", "port": port, **settings.extra})
    environment, log = environment_of(folder), folder / "log"
    if settings.perturb is not None:
        environment[VARIABLE] = str(settings.perturb)
    if settings.pp_size > 1:
        environment = on_cores(environment, range(settings.pp_size))
    with log.open("wb") as out:
        process = processes._start(command(settings), environment, out)
    try:
        found = Server(f"http://127.0.0.1:{port}", weights, settings)
        _wait_for(found, process, log)
        yield found
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        assert "memory leak" not in log.read_text(errors="replace")
        if (shared := found.shared_memory) is not None:
            process.terminate()
            process.wait(TIMEOUT)
            assert not shared.exists(), sorted(shared.iterdir())
    finally:
        end(process)


@contextmanager
def serve_strained(folder: Path, **changes: Any) -> Iterator[Server]:
    """Serve a tiny model, of which there are two sets of weights, with a fifth of the rows perturbed.

    changes: settings that are not as they are here.
    """
    weights = {name: write_checkpoint(folder / name, seed) for seed, name in enumerate(("v1", "v2"))}
    settings = EngineSettings(
        str(weights["v1"]),
        dtype="float32",
        radix_cache=True,
        max_total_tokens=POOL,
        max_running_requests=16,
        overlap=True,
        perturb=Perturbation(1, 0.2),
        extra={"weight_version": "v1", "chunked_prefill_size": CHUNK, "skip_tokenizer_init": False, **ADMIT_ALL},
    )
    with serve(folder, weights, replace(settings, **changes)) as found:
        yield found


def end(process: Any) -> None:
    """End a process and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_for(server: Server, process: Any, log: Path) -> None:
    end = time.monotonic() + TIMEOUT
    while True:
        assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-4000:]
        try:
            with server.open("/health"):
                return
        except OSError:
            time.sleep(0.5)


def make_prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, VOCAB, length).tolist() for length in lengths]


def worker(request: Path, samples: Path) -> list[str]:
    """Return the command of a rollout in a process of its own."""
    return [sys.executable, "-m", "r3_adapter.sglang.worker", str(request), str(samples)]


def part(name: str) -> Path:
    """Return where a file of the installed SGLang's sglang/srt is, or would be."""
    return Path(str(distribution("sglang").locate_file(f"sglang/srt/{name}")))


def on_cores(environment: Mapping[str, str], cores: Sequence[int], tp_size: int = 1) -> dict[str, str]:
    """Return variables that keep the ranks of an engine without a GPU to a core each.

    cores: [pp_size * tp_size], stage by stage.

    Source: sglang@0.5.20: srt/utils/numa_utils.py:init_threads_binding; sglang@0.5.15.post1, which takes a core for
        each rank of a stage, the same in all stages: srt/model_executor/model_runner.py:init_threads_binding
    """
    if has_gpu():
        return dict(environment)
    numa = part("utils/numa_utils.py")
    asked = cores if "def init_threads_binding(" in numa.read_text() else cores[:tp_size]
    found = "|".join(str(core % (os.cpu_count() or 1)) for core in asked)
    return {**environment, "SGLANG_CPU_OMP_THREADS_BIND": found}
