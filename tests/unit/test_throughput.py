"""Speed of a step: the arithmetic of a token is that of the parameters it meets, and a GPU is known by its name."""

import pytest

from r3_adapter.plan.model import ModelShape
from r3_adapter.proof.tiny import TinyModel, qwen3_moe_config
from r3_adapter.ray.throughput import PEAK_FLOPS, flops_per_token, peak_flops, throughput


def shape_of(tiny: TinyModel) -> ModelShape:
    return ModelShape.from_config(qwen3_moe_config(tiny, "bfloat16").to_dict())


def test_a_token_that_meets_all_experts_meets_all_parameters_but_the_table_of_inputs_and_the_last_norm() -> None:
    every = shape_of(TinyModel(num_experts=8, topk=8))
    assert flops_per_token(every) == 6 * (every.num_parameters() - every.embedding - every.norm)
    some = shape_of(TinyModel(num_experts=8, topk=2))
    experts = sum(layer.experts for layer in some.layers)
    assert flops_per_token(every) - flops_per_token(some) == 6 * experts * 6 / 8


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H200", "H200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpu_is_known_by_a_word_of_its_name(name: str, known: str | None) -> None:
    assert peak_flops(name) == (PEAK_FLOPS[known] if known else None)


def test_figures_of_gpus_are_there_only_with_gpus() -> None:
    seconds = {"step": 4.0, "rollout": 2.0, "train": 1.0}
    counts = {"response_tokens": 800, "trained_tokens": 1000, "num_ranks": 2, "flops": 1e12}
    plain = throughput(seconds, **counts, num_engine_gpus=0, gpu="")  # type: ignore[arg-type]
    assert plain == {"tokens_per_sec": 200, "rollout_tokens_per_sec": 400, "actor_train_tok_per_s": 1000}
    gpus = throughput(seconds, **counts, num_engine_gpus=4, gpu="NVIDIA H100")  # type: ignore[arg-type]
    more = {"tokens_per_gpu_per_sec": 100, "actor_train_tflops": 500, "mfu": pytest.approx(500e12 / 989e12)}
    assert gpus == {**plain, **more}
