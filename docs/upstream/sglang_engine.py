"""A tiny model on an engine with SGLang's own capture of routed experts, for the scripts beside this one."""

import asyncio
import base64
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np

from r3_adapter.proof.tiny import ENGINE, TinyModel, write_checkpoint
from r3_adapter.sglang.cpu import enable_cpu
from r3_adapter.sglang.engine import Engine
from r3_adapter.sglang.perturb import Perturbation
from r3_adapter.sglang.settings import EngineSettings

enable_cpu()  # before anything imports transformers
SHAPE = TinyModel()
PERTURB = Perturbation(seed=0, fraction=0.5)
"""Random experts in half of all rows: two computations of a token then use different ones."""


def start_engine(folder: str | Path = "", **options: Any) -> Engine:
    """Return an engine, not yet started, of the model in a folder or a new one; options are those of EngineSettings."""
    if not folder:
        folder = Path(tempfile.mkdtemp())
        write_checkpoint(folder, dtype="float32", seed=0)
    return Engine(
        EngineSettings(str(folder), routed_experts_format="flat", **{**ENGINE, "log_level": "error", **options})
    )


def write_tokenizer(folder: str) -> None:
    """Write one whose token 7 is the word t7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{at}": at for at in range(SHAPE.vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2")
    tokenizer.save_pretrained(folder)


def run_to_end(work: Coroutine[Any, Any, Any]) -> Any:
    """Run something in the event loop of the engines and return its result."""
    return asyncio.get_event_loop_policy().get_event_loop().run_until_complete(work)


def rows_of(reply: dict[str, Any]) -> Any:
    """Return [tokens, layers, top-k] of a reply."""
    flat = np.frombuffer(base64.b64decode(reply["meta_info"]["routed_experts"]), np.int32)
    return flat.reshape(-1, SHAPE.num_layers, SHAPE.topk)


def reply_retracted(engine: Engine, prompt: list[int], *, retract: bool = True, abort: bool = False) -> Any:
    """Return a reply of 100 tokens to a request that is retracted, or aborted, or both, when it has some of them."""
    return run_to_end(_retract(engine, prompt, retract, abort))


async def _retract(engine: Engine, prompt: list[int], retract: bool, abort: bool) -> Any:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    manager = engine._engine.tokenizer_manager
    params = {"temperature": 1.0, "max_new_tokens": 100, "ignore_eos": True}
    asked = asyncio.create_task(engine.reply(prompt, params))
    while not any(state.output_ids for state in manager.rid_to_state.values()):
        await asyncio.sleep(0.01)
    if retract:
        await manager.pause_generation(PauseGenerationReqInput(mode="retract"))
    if abort:
        manager.abort_request(abort_all=True)
        await asked
    await manager.continue_generation(ContinueGenerationReqInput())
    return await asked


def logprobs_with(rows: Any, tokens: list[int], folder: str) -> Any:
    """Return [tokens - 1] log-probabilities of all but the first, by Hugging Face's model with these experts."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    def use(layer: int) -> Any:
        def route(gate: Any, args: Any, output: Any) -> Any:
            logits, _, ids = output
            ids[: len(rows)] = torch.from_numpy(rows[:, layer].astype(np.int64))
            weights = logits.softmax(dim=-1).gather(1, ids)
            return logits, weights / weights.sum(dim=-1, keepdim=True), ids

        return route

    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for layer, block in enumerate(model.model.layers):
        block.mlp.gate.register_forward_hook(use(layer))
    with torch.no_grad():
        found = model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
    return found[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0].numpy()
