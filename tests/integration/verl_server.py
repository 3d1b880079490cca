"""verl's own SGLang server class in front of a patched engine; started by test_verl.py.

python verl_server.py CHECKPOINT
"""

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from r3_adapter.errors import CaptureError
from r3_adapter.processes import guarded
from r3_adapter.sglang.cpu import enable_cpu

enable_cpu()

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from sglang import Engine  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangHttpServer  # noqa: E402

from r3_adapter.frameworks.verl.sealed import unseal  # noqa: E402
from r3_adapter.proof.tiny import ENGINE  # noqa: E402
from r3_adapter.sglang.moe_config import MoEConfig  # noqa: E402
from r3_adapter.sglang.settings import EngineSettings  # noqa: E402

PROMPTS = [[5, 9, 200, 31], [7] * 20, [400, 3, 8]]
STEP = 70_001


def server(checkpoint: Path, engine: Any, *, skip_tokenizer_init: bool) -> Any:
    """Return verl's server, without the process and the HTTP port that it would have."""
    made = SGLangHttpServer.__new__(SGLangHttpServer)
    made.config = SimpleNamespace(
        enable_rollout_routing_replay=True,
        skip_tokenizer_init=skip_tokenizer_init,
        max_model_len=512,
        response_length=64,
        prompt_length=64,
        mtp=None,
    )
    made.model_config = SimpleNamespace(
        hf_config=AutoConfig.from_pretrained(checkpoint), lora_rank=0, lora={}, get=lambda name, default=None: default
    )
    made.tokenizer_manager, made.global_steps, made.replica_rank = engine.tokenizer_manager, STEP, 0
    made._disaggregation_role, made._pd_decode_peers = "null", []
    return made


async def check(checkpoint: Path, engine: Any) -> None:
    moe = MoEConfig.from_checkpoint(checkpoint)
    found = []
    # By either, verl itself takes a way that fails.
    for index, skip in enumerate((True, False)):
        asked = server(checkpoint, engine, skip_tokenizer_init=skip)
        params = {"temperature": 0.0, "logprobs": True, "ignore_eos": True, "max_new_tokens": 8}
        outputs = await asyncio.gather(
            *(
                asked.generate(prompt_ids=prompt, sampling_params=dict(params), request_id=f"{index}-{number}")
                for number, prompt in enumerate(PROMPTS)
            )
        )
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            tokens = [*prompt, *output.token_ids]
            assert len(output.token_ids) == len(output.log_probs) == 8
            assert len(output.routed_experts) == len(tokens) - 1
            rows = np.concatenate([output.routed_experts, np.zeros_like(output.routed_experts[:1])])
            found.append(unseal(rows, np.array(tokens), moe, "sample"))
            assert found[-1].weight_versions == (str(STEP),)
    assert found[:3] == found[3:]
    # Rows that differ between tokens are no zeros.
    assert len(np.unique(found[0].topk_ids[:-1].reshape(-1, moe.topk), axis=0)) > 10
    with pytest.raises(CaptureError, match="disaggregation role 'prefill'"):
        asked._disaggregation_role = "prefill"
        await asked.generate(PROMPTS[0], dict(params), "x")


def main(argv: list[str]) -> None:
    checkpoint = Path(argv[0])
    settings = EngineSettings(model_path=str(checkpoint), dtype="float32", **ENGINE)
    engine = Engine(**settings.engine_arguments(gpu=False) | {"routed_experts_format": "exact-flat"})
    try:
        engine.loop.run_until_complete(check(checkpoint, engine))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    with guarded():
        main(sys.argv[1:])
