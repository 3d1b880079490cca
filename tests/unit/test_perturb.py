"""A share of the rows gets other experts, of the row's own data alone: in each batch the same, and with no wait."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r3_adapter.errors import CaptureError
from r3_adapter.sglang.perturb import Perturbation

torch = pytest.importorskip("torch")

TOKENS, EXPERTS, TOPK = 2000, 16, 4
PLAIN: dict[str, Any] = {
    "top_k": TOPK,
    "scoring_func": "softmax",
    "renormalize": True,
    "correction_bias": None,
    "use_grouped_topk": False,
    "custom_routing_function": None,
    "num_fused_shared_experts": 0,
    "apply_routed_scaling_factor_on_output": False,
}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, unnormalised": {"renormalize": False},
    "softmax, unnormalised, scaled": {"renormalize": False, "apply_routed_scaling_factor_on_output": True},
    "sigmoid": {"scoring_func": "sigmoid"},
    "sigmoid, biased, scaled": {
        "scoring_func": "sigmoid",
        "correction_bias": torch.linspace(0, 1, EXPERTS),
        "apply_routed_scaling_factor_on_output": True,
    },
    # SGLang takes it for sigmoid, whatever it is called.
    "grouped, biased": {"use_grouped_topk": True, "correction_bias": torch.linspace(1, 0, EXPERTS)},
    "sqrtsoftplus": {"scoring_func": "sqrtsoftplus"},
    "a shared expert": {"num_fused_shared_experts": 1, "top_k": TOPK + 1},
    "a shared expert, unnormalised": {"num_fused_shared_experts": 1, "top_k": TOPK + 1, "renormalize": False},
}
SCALE, SHARED = 2.5, 0.4


def routed(config: Any, logits: Any, ids: Any) -> Any:
    """Return the weights of given experts, as a router of such a configuration has them."""
    grouped = config.use_grouped_topk and config.correction_bias is not None
    function = {
        "softmax": lambda x: x.softmax(1),
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
    }["sigmoid" if grouped else config.scoring_func]
    weights = function(logits).gather(1, ids.long())
    total = weights.sum(1, keepdim=True)
    if config.num_fused_shared_experts:
        weights = torch.cat([weights, total * SHARED], dim=1)
    if config.renormalize:
        weights = weights / total
    return weights * SCALE if config.apply_routed_scaling_factor_on_output else weights


def selection(router: str, tokens: int = TOKENS) -> tuple[Any, Any, Any, Any]:
    """Return configuration, logits, and the ids and weights that its router gives."""
    config = SimpleNamespace(**{**PLAIN, **ROUTERS[router]})
    logits = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(0))
    bias = 0 if config.correction_bias is None else config.correction_bias
    ids = (logits + bias).topk(TOPK, dim=1).indices.int()
    weights = routed(config, logits, ids)
    if config.num_fused_shared_experts:
        ids = torch.cat([ids, torch.full((tokens, 1), EXPERTS, dtype=torch.int32)], dim=1)
    return config, logits, ids, weights


@pytest.mark.parametrize("router", ROUTERS)
def test_perturbed_rows_have_distinct_experts_and_their_own_weights(router: str) -> None:
    config, logits, ids, weights = selection(router)
    new_ids, new_weights = Perturbation(1, 0.2).perturb(ids, weights, config, logits)
    changed = (new_ids != ids).any(1)
    assert abs(changed.float().mean() - 0.2) < 0.03
    assert torch.equal(new_weights[~changed], weights[~changed])
    assert (new_ids.dtype, new_weights.dtype, new_ids.shape) == (torch.int32, weights.dtype, ids.shape)
    assert (new_ids.sort(1).values.diff(dim=1) > 0).all()
    chosen = new_ids[changed, :TOPK]
    assert torch.equal(new_ids[:, TOPK:], ids[:, TOPK:])
    # Each expert is as likely as any other: a share of 4 / 16 of 400 rows.
    assert ((chosen.flatten().bincount() / len(chosen) - TOPK / EXPERTS).abs() < 0.1).all()
    torch.testing.assert_close(new_weights[changed], routed(config, logits, new_ids[:, :TOPK])[changed])


def test_a_row_fares_alike_in_every_batch() -> None:
    config, logits, ids, weights = selection("softmax")
    perturbation = Perturbation(1, 0.2)
    want_ids, want_weights = perturbation.perturb(ids, weights, config, logits, layer=3)
    for rows in (torch.randperm(TOKENS), torch.arange(7, 8), torch.arange(100).repeat(2)):
        found = perturbation.perturb(ids[rows], weights[rows], config, logits[rows], layer=3)
        assert torch.equal(found[0], want_ids[rows]) and torch.equal(found[1], want_weights[rows])


def test_seeds_layers_and_logits_choose_other_rows_and_experts() -> None:
    config, logits, ids, weights = selection("softmax")
    first, _ = Perturbation(1, 0.2).perturb(ids, weights, config, logits, layer=0)
    nudged = logits.clone()
    nudged[:, 5] = torch.nextafter(nudged[:, 5], torch.tensor(9.0))
    for perturbation, layer, given in (
        (Perturbation(2, 0.2), 0, logits),
        (Perturbation(1, 0.2), 1, logits),
        (Perturbation(1, 0.2), 0, nudged),
        (Perturbation(1, 0.2), 0, logits.roll(1, dims=1)),
    ):
        other, _ = perturbation.perturb(ids, weights, config, given, layer=layer)
        both = ((first != ids).any(1) & (other != ids).any(1)).float().mean()
        # Independent choices of a fifth coincide in a 25th.
        assert abs(both - 0.04) < 0.02
        assert ((first == other).all(1) & (first != ids).any(1)).sum() == 0


def test_a_limit_on_the_device_turns_it_off_and_on() -> None:
    config, logits, ids, weights = selection("softmax")
    perturbation, limit = Perturbation(1, 0.2), torch.zeros((), dtype=torch.int64)
    off = perturbation.perturb(ids, weights, config, logits, limit=limit)
    assert torch.equal(off[0], ids) and torch.equal(off[1], weights)
    on = perturbation.perturb(ids, weights, config, logits, limit=limit.fill_(perturbation.limit))
    assert torch.equal(on[0], perturbation.perturb(ids, weights, config, logits)[0])


def test_scores_that_vanish_leave_the_row_as_it_is() -> None:
    """Of other experts than the own ones float32 cannot say more than 0."""
    config = SimpleNamespace(**PLAIN)
    logits = torch.full((TOKENS, EXPERTS), -200.0)
    logits[:, :TOPK] = torch.rand(TOKENS, TOPK)
    ids = torch.arange(TOPK, dtype=torch.int32).repeat(TOKENS, 1)
    weights = routed(config, logits, ids)
    found = Perturbation(1, 1.0).perturb(ids, weights, config, logits)
    assert torch.isfinite(found[1]).all()
    assert (found[0] != ids).any() and (found[0] < TOPK).any(1).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_one_graph_serves_all_rows(router: str) -> None:
    """It is traced with other data than it is run on: a value that reached the host would be a constant of it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    config, logits, ids, weights = selection(router)
    config.correction_bias = None if config.correction_bias is None else config.correction_bias.clone()
    perturbation, limit = Perturbation(1, 0.2), torch.tensor(Perturbation(1, 0.2).limit)

    def run(ids: Any, weights: Any, logits: Any, limit: Any) -> Any:
        return perturbation.perturb(ids, weights, config, logits, limit=limit, layer=2)

    with FakeTensorMode() as fake:
        # Fake tensors have no values: asking for one raises.
        run(*(fake.from_tensor(each) for each in (ids, weights, logits, limit)))
    graph = make_fx(run)(ids.flip(0), weights.flip(0), logits.flip(0) * 2, limit * 0)
    names = {str(node.target).removeprefix("aten.") for node in graph.graph.nodes}
    assert not {name for name in names if name.startswith(("rand", "item", "_local_scalar"))}
    for found, want in zip(graph(ids, weights, logits, limit), run(ids, weights, logits, limit), strict=True):
        assert torch.equal(found, want)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids, weights, logits, limit)[0], run(ids, weights, logits, limit)[0])


def captured(run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
    """Return what runs a captured graph anew, and its outputs; where there is no GPU, a stand-in of both."""
    found = run()
    if not torch.cuda.is_available():
        return lambda: [place.copy_(each) for place, each in zip(found, run(), strict=True)], found
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph.replay, found


@pytest.mark.gpu
def test_a_cuda_graph_perturbs_the_rows_of_each_replay() -> None:
    config, logits, ids, weights = selection("softmax", 64)
    perturbation, device = Perturbation(1, 0.5), "cuda" if torch.cuda.is_available() else "cpu"
    given = [torch.zeros_like(each, device=device) for each in (ids, weights, logits)]
    limit = torch.full((), perturbation.limit, dtype=torch.int64, device=device)
    replay, found = captured(lambda: perturbation.perturb(*given[:2], config, given[2], limit=limit))
    for rows in (torch.arange(64), torch.randperm(64)):
        for place, each in zip(given, (ids, weights, logits), strict=True):
            place.copy_(each[rows])
        replay()
        want, _ = perturbation.perturb(ids[rows], weights[rows], config, logits[rows])
        assert torch.equal(found[0].cpu(), want) and not torch.equal(want, ids[rows])
    limit.fill_(0)
    replay()
    assert torch.equal(found[0], given[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"custom_routing_function": print}, r"custom routing \(print\)"),
        ({"scoring_func": "sinkhorn"}, "scoring 'sinkhorn' is not known"),
    ],
)
def test_routers_that_weigh_otherwise_are_refused(change: dict[str, Any], said: str) -> None:
    config, logits, ids, weights = selection("softmax", 1)
    with pytest.raises(CaptureError, match=said):
        Perturbation(0, 0.5).perturb(ids, weights, SimpleNamespace(**{**vars(config), **change}), logits)


@pytest.mark.parametrize("text", ["", "1", "1:", "x:0.2", "1:0", "1:1.5", "1:nan"])
def test_a_malformed_perturbation_is_refused(text: str) -> None:
    with pytest.raises(CaptureError):
        Perturbation.parse(text)


def test_only_an_engine_that_was_started_for_it_can_be_perturbed(tmp_path: Path) -> None:
    from r3_adapter.sglang.engine import Engine
    from r3_adapter.sglang.settings import EngineSettings

    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CaptureError, match="cannot be perturbed"):
        Engine(EngineSettings(str(tmp_path))).perturb(False)
