"""Check what a running server reports about itself against a checkpoint, and sample from each of its endpoints."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r3_adapter.errors import CaptureError, check_choice, check_whole, show
from r3_adapter.rollout import Sample
from r3_adapter.sglang.http import checked_url, generate_over_http, get_json, post_json
from r3_adapter.sglang.moe_config import MoEConfig, read_config
from r3_adapter.sglang.openai import sample_of_openai
from r3_adapter.sglang.sampling import ENGINE_REFUSALS, check_engine

Api = Literal["generate", "openai"]
Progress = Callable[[int, int], None]
DTYPES = ("float32", "bfloat16", "float16")
_MAX_WORD = 200
_TOGETHER = 16
"""Requests that are asked at once, so that the engine batches them."""


@dataclass(frozen=True)
class Served:
    """What a server reports about itself.

    version: SGLang's. name: the model's, as the OpenAI endpoints have it. weight_version: that of rows.
    dtype: of the computation. quantization: the server's word for it, or the checkpoint's; None where there is none.
    """

    url: str
    version: str
    name: str
    weight_version: str
    dtype: str
    quantization: str | None

    @property
    def about(self) -> dict[str, Any]:
        """Return it for a report, without the name, which may be a path of the server's host."""
        return {
            "url": self.url,
            "version": self.version,
            "weight_version": self.weight_version,
            "dtype": self.dtype,
            "quantization": self.quantization,
        }


def served_at(url: str, checkpoint: Path, *, timeout: float = 60, proxy: str | None = None) -> Served:
    """Ask a server for its model and settings, and check them against the checkpoint that it should serve.

    Raises:
        CaptureError: no server answers, or one of another kind of model; one that records no routes, or in another form
            than "safetensors"; one whose log-probabilities are not those of its samples' distribution.
    """
    url = checked_url(url)
    model, info = (
        _mapping(get_json(f"{url}/{path}", timeout=timeout, proxy=proxy, place=url), f"{url}/{path}")
        for path in ("model_info", "server_info")
    )
    config = read_config(checkpoint / "config.json")
    for name in ("model_type", "architectures"):
        if (said := model.get(name)) is not None and said != config.get(name):
            raise CaptureError(f"{url}: {name} {show(said)} != {show(config.get(name))} of {checkpoint}")
    if not info.get("enable_return_routed_experts"):
        raise CaptureError(f"{url}: records no routes; start SGLang with --enable-return-routed-experts")
    if (form := info.get("routed_experts_format")) != "safetensors":
        raise CaptureError(
            f"{url}: routed_experts_format {show(form)} != 'safetensors': start it patched, with "
            "--routed-experts-format safetensors; rows of another form do not say what they belong to"
        )
    if info.get("routed_experts_dir") is not None:
        raise CaptureError(f"{url}: hands routes over in files of its host (--routed-experts-dir), which are not read")
    check_engine({name: info.get(name) for name in (*ENGINE_REFUSALS, "sampling_backend")})
    dtype = _word(info, "dtype", url)
    dtype = str(config.get("dtype") or config.get("torch_dtype")) if dtype == "auto" else dtype
    dtype = {"half": "float16", "float": "float32"}.get(dtype, dtype)
    if dtype not in DTYPES:
        raise CaptureError(f"{url}: dtype {show(dtype)} is none of {', '.join(DTYPES)}")
    quantized = info.get("quantization") or _mapping(config.get("quantization_config") or {}, "config").get(
        "quant_method"
    )
    if quantized is not None and not isinstance(quantized, str):
        raise CaptureError(f"{url}: quantization {show(quantized)} is no word")
    # Where SGLang 0.5.15 has it, and where later ones do.
    name, weights = _word({**info, **model}, "served_model_name", url), _word(model, "weight_version", url)
    return Served(url, _word(info, "version", url), name, weights, dtype, quantized)


def ask(
    served: Served,
    api: Api,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    checkpoint: Path,
    *,
    timeout: float = 600,
    proxy: str | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Sample]:
    """Sample a response of each prompt, at temperature 1; several requests are under way at once.

    api: "generate", or "openai" for one prompt at /v1/completions and the next at /v1/chat/completions, in turn.
    lengths: tokens of each response.
    checkpoint: what rows are checked against: experts, layers, sizes.

    Raises:
        CaptureError: the server refuses, or a reply cannot be used, is of another model, or of other weights than it
            said to have before.
        TraceError: malformed routes.
    """
    check_choice("api", api, Api, CaptureError)
    moe, sizes = MoEConfig.if_known(checkpoint), sizes_of(checkpoint)

    def one(index: int) -> list[Sample]:
        prompt, length, place = list(prompts[index]), lengths[index], f"{served.url} request {index}"
        if api == "generate":
            params = {"temperature": 1.0, "max_new_tokens": length, "ignore_eos": True}
            found = generate_over_http(
                served.url, [prompt], params, moe, recomputed="split", timeout=timeout, proxy=proxy
            )
        else:
            path, body = _openai_request(served, prompt, length, chat=bool(index % 2))
            reply = post_json(f"{served.url}{path}", body, timeout=timeout, proxy=proxy, place=place)
            found = [sample_of_openai(reply, body, moe, prompt_ids=prompt, place=place)]
        for sample in found:
            _check(sample, served, sizes, place)
        return found

    samples = list[Sample]()
    with ThreadPoolExecutor(_TOGETHER) as pool:
        try:
            for index, found in enumerate(pool.map(one, range(len(prompts)))):
                samples += found
                progress(index + 1, len(prompts))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return samples


def _openai_request(served: Served, prompt: list[int], length: int, *, chat: bool) -> tuple[str, dict[str, Any]]:
    """Return path and body; the prompt is token ids at both endpoints, so that no tokenizer stands between."""
    body = {
        "model": served.name,
        "temperature": 1.0,
        "repetition_penalty": 1.0,
        "max_tokens": length,
        "ignore_eos": True,
        "return_routed_experts": True,
    }
    if chat:
        # The ids take the place of what the messages' text would be.
        words = {"messages": [{"role": "user", "content": "-"}], "input_ids": prompt, "logprobs": True}
        return "/v1/chat/completions", {**body, **words}
    return "/v1/completions", {**body, "prompt": prompt, "logprobs": 1}


def sizes_of(checkpoint: Path) -> Mapping[str, int]:
    """Return a model's num_layers, hidden_size and vocab_size, as config.json or its text part has them.

    Raises:
        CaptureError: one is missing, or no whole number.
    """
    config = read_config(checkpoint / "config.json")
    inner = config.get("text_config")
    text = {**config, **inner} if isinstance(inner, dict) else config
    place = f"{checkpoint / 'config.json'}: "
    return {
        name: check_whole(f"{place}{key}", text.get(key), 1, error=CaptureError)
        for name, key in (("num_layers", "num_hidden_layers"), ("hidden_size",) * 2, ("vocab_size",) * 2)
    }


def _check(sample: Sample, served: Served, sizes: Mapping[str, int], place: str) -> None:
    trace = sample.trace
    if trace.model is None:
        raise CaptureError(f"{place}: its routes do not say which model they are of; is the server patched?")
    for name, want in sizes.items():
        if (have := getattr(trace.model, name)) != want:
            raise CaptureError(f"{place}: routes of a model with {name} {have} != {want} of the checkpoint")
    missing = int((~trace.captured[:-1]).sum())
    if missing:
        raise CaptureError(f"{place}: {missing} of {trace.num_tokens - 1} tokens have no route")
    if (versions := sorted({trace.weight_versions[at] for at in trace.version_ids[:-1]})) != [served.weight_version]:
        raise CaptureError(
            f"{place}: routes of weights {show(versions)} != {show(served.weight_version)}, as the server says it has"
        )


def _mapping(found: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise CaptureError(f"{place}: {show(found)} is no JSON object")
    return found


def _word(info: Mapping[str, Any], name: str, place: str) -> str:
    found = info.get(name)
    if not isinstance(found, str) or not 0 < len(found) <= _MAX_WORD or not found.isprintable():
        raise CaptureError(f"{place}: {name} {show(found)} is no word")
    return found


def copy_with_dtype(checkpoint: Path, folder: Path, dtype: str) -> Path:
    """Make a checkpoint of the same weights that a trainer computes in a dtype, of links; return its folder."""
    config = read_config(checkpoint / "config.json")
    folder.mkdir(parents=True)
    for path in checkpoint.resolve().iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
