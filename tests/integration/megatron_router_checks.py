"""What the patched Megatron promises of its routers; test_megatron_router.py runs this file in a process of its own.

T: tokens; M: MoE layers; K: experts a token; E: experts of a layer.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import megatron_tiny as tiny
import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_default_pg_collection,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch._subclasses.fake_tensor import FakeTensorMode

from r3_adapter.megatron.grouped_experts import group_experts

Found = dict[str, torch.Tensor]

all_routers = pytest.mark.parametrize("router", tiny.ROUTERS)


@pytest.fixture(scope="session", autouse=True)
def started() -> None:
    tiny.start()


def assert_same_bits(want: Found, have: Found) -> None:
    assert want.keys() == have.keys()
    different = [key for key in want if want[key].numpy().tobytes() != have[key].numpy().tobytes()]
    assert different == []


def shuffled(experts: torch.Tensor, seed: int = 5) -> torch.Tensor:
    """Return the same ids in another order in each row."""
    noise = torch.rand(experts.shape, generator=torch.Generator().manual_seed(seed))
    return experts.gather(-1, noise.argsort(-1))


@all_routers
@pytest.mark.parametrize("topk", [2, 4])
def test_own_routes_in_any_order_give_the_bits_of_live_routing(router: str, topk: int) -> None:
    options = {**tiny.ROUTERS[router], "moe_router_topk": topk}
    live = tiny.step(tiny.build(**options))
    own = tiny.own_experts(tiny.build(**options))
    for experts in (own, shuffled(own), own.view(torch.uint16), shuffled(own).to(torch.uint8)):
        assert_same_bits(live, tiny.step(tiny.build(**options), routed_experts=experts))


@all_routers
def test_rows_without_a_route_give_the_bits_of_live_routing(router: str) -> None:
    options = tiny.ROUTERS[router]
    none = torch.full((tiny.MOE_LAYERS, tiny.TOKENS, tiny.TOPK), -1, dtype=torch.int16)
    assert_same_bits(tiny.step(tiny.build(**options)), tiny.step(tiny.build(**options), routed_experts=none))


@all_routers
def test_the_order_of_ids_changes_no_bit(router: str) -> None:
    options, experts = tiny.ROUTERS[router], tiny.random_experts()
    given = tiny.step(tiny.build(**options), routed_experts=experts)
    assert_same_bits(given, tiny.step(tiny.build(**options), routed_experts=shuffled(experts)))
    live = tiny.step(tiny.build(**options))
    assert not torch.equal(given["losses"], live["losses"])


def test_equal_scores_keep_the_order_of_the_ids() -> None:
    """Coarse logits are often equal; ids in the order of top-k give the same bits then too."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, tiny.EXPERTS, generator=generator).mul(2).round()
    assert (logits.sort(1).values.diff(dim=1) == 0).any(1).float().mean() > 0.5
    weight = torch.randn(512, tiny.EXPERTS, generator=generator)
    found = []
    for experts in (None, logits.topk(4, 1).indices):
        leaf = logits.clone().requires_grad_()
        probs, routing_map = topk_routing_with_score_function(leaf, 4, routed_experts=experts)
        (probs * weight).sum().backward()
        found.append((probs, routing_map, leaf.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_scores_in_another_order_change_the_gradient_by_rounding_alone(dtype: torch.dtype) -> None:
    """A row's weights are the same in any order of its ids; a sum of its gradient may be taken in another order."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, tiny.EXPERTS, generator=generator).mul(2).round().to(dtype)
    weight = torch.randn(512, tiny.EXPERTS, generator=generator).to(dtype)
    found = []
    for experts in (None, logits.topk(4, 1).indices.sort(1).values):
        leaf = logits.clone().requires_grad_()
        probs, routing_map = topk_routing_with_score_function(leaf, 4, routed_experts=experts)
        (probs * weight).sum().backward()
        found.append((probs, routing_map, leaf.grad))
    (probs, routing_map, gradient), (other_probs, other_map, other_gradient) = found
    assert torch.equal(probs, other_probs)
    assert torch.equal(routing_map, other_map)
    torch.testing.assert_close(gradient, other_gradient, atol=2 * torch.finfo(dtype).eps, rtol=0)


def test_aux_loss_beside_an_expert_bias_counts_what_the_option_says() -> None:
    """A biased router's aux loss counts unbiased scores; only "live" keeps that under its own routes."""
    options = tiny.BIAS_AND_AUX
    live, own = tiny.step(tiny.build(**options)), tiny.own_experts(tiny.build(**options))
    kept = tiny.step(tiny.build(**options, moe_router_replay_aux_loss="live"), routed_experts=own)
    assert_same_bits(live, kept)
    counted = tiny.step(tiny.build(**options), routed_experts=own)
    assert torch.equal(live["losses"], counted["losses"])
    gate = "grad decoder.layers.3.mlp.router.weight"
    assert not torch.equal(live[gate], counted[gate])


@pytest.mark.parametrize("router", ["softmax", "groups", "jitter_z_loss", "shared_experts"])
@pytest.mark.parametrize("recompute", [name for name in tiny.RECOMPUTE if name != "none"])
def test_recomputation_gives_the_same_bits(router: str, recompute: str) -> None:
    options, experts = tiny.ROUTERS[router], tiny.random_experts()
    want = tiny.step(tiny.build(**options), routed_experts=experts)
    have = tiny.step(tiny.build(**options, **tiny.RECOMPUTE[recompute]), routed_experts=experts)
    assert_same_bits(want, have)


@pytest.mark.parametrize("recompute", tiny.RECOMPUTE)
def test_counts_of_the_expert_bias_are_of_the_routes_without_padding(recompute: str) -> None:
    experts = tiny.random_experts()
    padding = torch.zeros(tiny.BATCH, tiny.SEQ, dtype=torch.bool)
    padding[0, 11:] = padding[1, 14:] = True
    model = tiny.build(**tiny.BIAS, **tiny.RECOMPUTE[recompute])
    tiny.step(model, routed_experts=experts, padding_mask=padding)
    kept = ~padding.t().reshape(-1)
    for router, rows in zip(tiny.routers(model), experts, strict=True):
        want = torch.bincount(rows[kept].long().flatten(), minlength=tiny.EXPERTS)
        assert torch.equal(router.local_tokens_per_expert, want.float())


def test_evaluation_counts_nothing_and_uses_the_routes() -> None:
    model, experts = tiny.build(**tiny.BIAS), tiny.random_experts()
    with torch.no_grad():
        losses = tiny.forward(model, routed_experts=experts)
    assert all(router.local_tokens_per_expert.sum() == 0 for router in tiny.routers(model))
    assert torch.equal(losses, tiny.step(model, routed_experts=experts)["losses"])


def test_fused_router_is_replaced_where_routes_are_given() -> None:
    experts = tiny.random_experts()
    want = tiny.step(tiny.build(), routed_experts=experts)
    assert_same_bits(want, tiny.step(tiny.build(moe_router_fusion=True), routed_experts=experts))
    with pytest.raises(ValueError, match="fused_topk_with_score_function is not available"):
        tiny.step(tiny.build(moe_router_fusion=True))


def test_padding_for_quantized_experts_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts get multiples of 16 tokens; those that pad weigh nothing."""
    monkeypatch.setattr(token_dispatcher, "get_align_size_for_quantization", lambda config: 16)
    experts = tiny.random_experts()
    want = tiny.step(tiny.build(), routed_experts=experts)
    model = tiny.build()
    model.config.moe_router_padding_for_quantization = True  # asks for fp8 when it is set at construction
    counts = []
    for layer in model.decoder.layers[1:]:
        layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[1]))
    have = tiny.step(model, routed_experts=experts)
    assert len(counts) == tiny.MOE_LAYERS
    assert all((torch.as_tensor(count) % 16 == 0).all() for count in counts)
    assert sum(int(torch.as_tensor(count).sum()) for count in counts) > tiny.MOE_LAYERS * tiny.TOKENS * tiny.TOPK
    for key, value in want.items():
        torch.testing.assert_close(have[key], value)


def test_repeated_id_makes_the_loss_and_the_gradients_nan() -> None:
    experts = tiny.random_experts()
    experts[1, 9] = experts[1, 9, 0]
    found = tiny.step(tiny.build(), routed_experts=experts)
    assert found["losses"].mean().isnan()
    assert found["grad embedding.word_embeddings.weight"].isnan().any()


@pytest.mark.parametrize("value", [tiny.EXPERTS, -2, 32767])
def test_id_out_of_range_never_trains(value: int) -> None:
    experts = tiny.random_experts()
    experts[2, 5, 1] = value
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        tiny.forward(tiny.build(), routed_experts=experts)


@pytest.mark.parametrize("recompute", tiny.RECOMPUTE)
def test_routes_may_lie_at_a_fixed_address(recompute: str) -> None:
    """A buffer that is filled anew for each step does as well as new tensors."""
    buffer = torch.empty(tiny.MOE_LAYERS, tiny.TOKENS, tiny.TOPK, dtype=torch.int16)
    for seed in range(3):
        buffer.copy_(tiny.random_experts(seed))
        have = tiny.step(tiny.build(**tiny.RECOMPUTE[recompute]), routed_experts=buffer)
        assert_same_bits(tiny.step(tiny.build(), routed_experts=tiny.random_experts(seed)), have)


@pytest.mark.parametrize("recompute", ["uniform", "block", "moe"])
def test_routes_overwritten_before_recomputation_are_an_error(recompute: str) -> None:
    buffer, model = tiny.random_experts(0), tiny.build(**tiny.RECOMPUTE[recompute])
    losses = tiny.forward(model, routed_experts=buffer)
    buffer.copy_(tiny.random_experts(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.mean().backward()


def _router(**options: Any) -> TopKRouter:
    return TopKRouter(tiny.build(**options).config, get_default_pg_collection()).train()


GRAPHED: Mapping[str, Mapping[str, Any]] = {**tiny.ROUTERS, "bias_and_aux": tiny.BIAS_AND_AUX}


dtypes = pytest.mark.parametrize("dtype", [torch.int16, torch.uint16])


@dtypes
@pytest.mark.parametrize("router", GRAPHED)
def test_router_reads_nothing_on_the_host(router: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values; forward and backward of the whole router pass without."""
    config = tiny.build(**GRAPHED[router]).config
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    with FakeTensorMode():
        module = TopKRouter(config, get_default_pg_collection()).train()
        hidden = torch.empty(tiny.SEQ, tiny.BATCH, config.hidden_size)
        experts = torch.empty(tiny.TOKENS, tiny.TOPK, dtype=dtype)
        probs, routing_map = module(hidden, None, experts)
        probs.sum().backward()
    assert probs.shape == routing_map.shape == (tiny.TOKENS, tiny.EXPERTS)


@pytest.fixture
def dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch.compile compile, which CPU support turns off."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    with torch._dynamo.config.patch(disable=False):
        yield
    torch._dynamo.reset()


@dtypes
@pytest.mark.parametrize("router", GRAPHED)
def test_router_compiles_into_one_graph(router: str, dtype: torch.dtype, dynamo: None) -> None:
    """No graph break: one graph serves all routes, and gives what eager gives."""
    module = _router(**GRAPHED[router])
    logits = torch.randn(tiny.SEQ, tiny.BATCH, tiny.EXPERTS, generator=torch.Generator().manual_seed(0))
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module.routing, fullgraph=True, backend=backend)
    for seed in range(2):
        experts = tiny.random_experts(seed)[0].view(dtype)
        if dtype.is_signed:
            experts[seed::5] = -1
        for want, have in zip(
            module.routing(logits, routed_experts=experts), compiled(logits, routed_experts=experts), strict=True
        ):
            assert torch.equal(want, have)
    assert len(graphs) == 1


def test_experts_that_compute_together_change_no_bit() -> None:
    """In bfloat16, on processors with instructions for it; losses and all gradients."""
    options = {"params_dtype": torch.bfloat16, "bf16": True}
    given = {"routed_experts": tiny.random_experts()}
    given["routed_experts"][0] = torch.tensor([2, 5])
    alone = tiny.step(tiny.build(**options).bfloat16(), **given)
    model = tiny.build(**options).bfloat16()
    group_experts([model])
    grouped = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert len(grouped) == tiny.MOE_LAYERS
    together = tiny.step(model, **given)
    different = [key for key in alone if not torch.equal(alone[key], together[key])]
    assert different == [] or not torch.cpu._is_avx512_bf16_supported()
