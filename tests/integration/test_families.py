"""Routes of other families' models, replayed in Megatron: a trainer of two ranks scores all of them."""

import json
from collections.abc import Mapping
from importlib.util import find_spec

import pytest

from r3_adapter.proof.families import KERNELS, NOT_ON_CPU
from r3_adapter.proof.models import Model, families
from r3_adapter.proof.shown import prove_families
from r3_adapter.proof.verdict import Verdict

pytestmark = [
    pytest.mark.engine,
    pytest.mark.megatron,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        find_spec("megatron") is None or find_spec("megatron.bridge") is None, reason="megatron-bridge is not installed"
    ),
]

TRAINED = [name for name in families() if name not in NOT_ON_CPU]
MOONLIGHT = "Moonlight, narrow"
"""Its shape as it is published, but for widths: 64 experts, six a token, two shared ones, no compressed queries."""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Verdict]:
    folder = tmp_path_factory.mktemp("moonlight")
    config = {
        **{"model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 11264, "vocab_size": 163840},
        **{"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64},
        **{"num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": None},
        **{"moe_intermediate_size": 1408, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128},
        **{"v_head_dim": 128, "n_group": 1, "topk_group": 1, "rope_theta": 50000.0, "routed_scaling_factor": 2.446},
        **{"num_nextn_predict_layers": 0, "bos_token_id": 163584, "eos_token_id": 163585},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    models = [Model(name, rollout="transformers") for name in [*TRAINED, str(folder)]]
    # What mixes tokens of a sequence otherwise than attention is not to reach into the next one.
    return dict(zip([*TRAINED, MOONLIGHT], prove_families(models, packed=KERNELS), strict=True))


@pytest.mark.parametrize("name", [*TRAINED, MOONLIGHT])
def test_the_routes_of_a_family_replay(name: str, verdicts: Mapping[str, Verdict]) -> None:
    found = verdicts[name]
    assert found.passed, found.sentence
    assert found.max_abs_dlogp_replay <= 1e-4 and found.max_abs_dlogp_live >= 1e-2
    assert found.routes_replayed == found.routes_trained == found.routes_expected > 0
    assert found.options["qkv_format"] == ("thd" if name in KERNELS else "sbhd")
    assert found.about["model"]["rollout"] == "transformers" and found.layout["ep"] == 2
