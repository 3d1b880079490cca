"""What a checkpoint's config.json says about sizes: parameters, and what a rank of a layout holds of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from r3_adapter.errors import LayoutError
from r3_adapter.layout import ParallelLayout
from r3_adapter.sglang.facts import ModelFacts


class Parameters(NamedTuple):
    """Parameters of a rank: what every data-parallel rank has a copy of, and routed experts."""

    dense: int
    expert: int


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder with routed experts.

    family: model_type of the configuration.
    facts: its layers and routers.
    num_kv_heads: None under multi-head latent attention, where all ranks have the one latent.
    kv_size: numbers that a token has in the KV cache of a layer, for one key-value head or for the latent.
    attention_split, attention_whole: parameters of a layer's attention that tensor parallelism cuts, and does not cut.
    ffn_size, expert_ffn_size, shared_ffn_size: inner sizes of dense layers, of a routed expert and of all shared ones.
    num_mtp_layers: multi-token prediction layers, which are not part of the figures.
    """

    family: str
    facts: ModelFacts
    hidden_size: int
    num_heads: int
    num_kv_heads: int | None
    kv_size: int
    attention_split: int
    attention_whole: int
    ffn_size: int
    expert_ffn_size: int
    shared_ffn_size: int
    vocab_size: int
    max_length: int | None
    tied: bool
    num_mtp_layers: int
    dtype_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, place: str = "config") -> "ModelShape":
        """Read a Hugging Face configuration; of a multimodal model, its text part.

        Raises:
            R3Error: a size is missing; names `place`.

        Source: transformers@5.12.1: Qwen3MoeConfig, DeepseekV3Config
        """
        text = config.get("text_config") or config
        facts = ModelFacts.from_config(config, place=place)
        hidden, heads = _size(text, "hidden_size", place), _size(text, "num_attention_heads", place)
        family = str(text.get("model_type", "unknown"))
        kv_heads: int | None = None
        if text.get("kv_lora_rank"):
            kv_size, split, whole = _latent_attention(text, hidden, heads, place)
        else:
            kv_heads = int(text.get("num_key_value_heads") or heads)
            head = int(text.get("head_dim") or hidden // heads)
            kv_size, split = 2 * head, 2 * hidden * head * (heads + kv_heads)
            # Qwen3 normalizes queries and keys.
            whole = 2 * head if family.startswith("qwen3") else 0
        expert_ffn = int(text.get("moe_intermediate_size") or _size(text, "intermediate_size", place))
        shared = text.get("shared_expert_intermediate_size")
        dtype = text.get("dtype") or text.get("torch_dtype") or "bfloat16"
        return cls(
            family=family,
            facts=facts,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            kv_size=kv_size,
            attention_split=split,
            attention_whole=whole,
            ffn_size=int(text.get("intermediate_size") or expert_ffn),
            expert_ffn_size=expert_ffn,
            shared_ffn_size=int(shared or (text.get("n_shared_experts") or 0) * expert_ffn),
            vocab_size=_size(text, "vocab_size", place),
            max_length=text.get("max_position_embeddings"),
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            num_mtp_layers=int(text.get("num_nextn_predict_layers") or 0),
            dtype_size=4 if dtype == "float32" else 2,
        )

    @classmethod
    def from_file(cls, path: Path) -> "ModelShape":
        """Read config.json, or the one in a checkpoint's folder.

        Raises:
            R3Error: it cannot be read, or says too little.
        """
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LayoutError(f"{path}: cannot be read: {error}") from error
        return cls.from_config(config, place=str(path))

    @property
    def num_moe_layers(self) -> int:
        return len(self.facts.layer_ids)

    def num_parameters(self) -> int:
        """Return the parameters of the whole model, without multi-token prediction layers."""
        return sum(self.rank_parameters(range(self.facts.num_layers), ParallelLayout(), first=True, last=True))

    def rank_parameters(self, layers: Sequence[int], layout: ParallelLayout, *, first: bool, last: bool) -> Parameters:
        """Return what a rank holds that has these decoder layers.

        first, last: whether its pipeline stage has the embedding, and the final norm and the output layer.
        """
        hidden, tp = self.hidden_size, layout.tp
        assert layout.etp is not None
        num_moe = len(set(layers) & set(self.facts.layer_ids))
        num_dense = len(layers) - num_moe
        dense = len(layers) * (_share(self.attention_split, tp) + self.attention_whole + 2 * hidden)
        dense += num_dense * _share(3 * hidden * self.ffn_size, tp)
        dense += num_moe * (hidden * self.facts.num_experts + _share(3 * hidden * self.shared_ffn_size, tp))
        table = _share(self.vocab_size * hidden, tp)
        dense += table if first else 0
        # A tied output layer is a copy of the embedding where another stage has that.
        dense += hidden + (0 if self.tied and first else table) if last else 0
        experts = _share(self.facts.num_experts, layout.ep)
        return Parameters(dense, num_moe * experts * _share(3 * hidden * self.expert_ffn_size, layout.etp))


def _latent_attention(text: Mapping[str, Any], hidden: int, heads: int, place: str) -> tuple[int, int, int]:
    latent, rope = _size(text, "kv_lora_rank", place), _size(text, "qk_rope_head_dim", place)
    nope, value = _size(text, "qk_nope_head_dim", place), _size(text, "v_head_dim", place)
    query = text.get("q_lora_rank")
    split = heads * (latent * (nope + value) + value * hidden + (query or hidden) * (nope + rope))
    # The projections to the latents, and the latents' norms.
    whole = hidden * (latent + rope) + latent + ((hidden + 1) * query if query else 0)
    return latent + rope, split, whole


def _share(number: int, parts: int) -> int:
    return -(-number // parts)


def _size(text: Mapping[str, Any], name: str, place: str) -> int:
    value = text.get(name)
    if type(value) is not int or value < 1:
        raise LayoutError(f"{place}: {name} ({value!r}) is not a whole number from 1")
    return value
