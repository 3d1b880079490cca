"""What `r3 bench replay --shape` calls: a model of a shape, and the ways in which its routers come by their experts."""

import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from r3_adapter.arena import Arena
from r3_adapter.bench.timing import Call
from r3_adapter.errors import R3Error
from r3_adapter.layout import ParallelLayout
from r3_adapter.machine import gpu_driver, version_of
from r3_adapter.megatron.layers import moe_routers
from r3_adapter.megatron.policy_trainer.build import build_chunk, rope_of, transformer_config
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.megatron.reach import routed_live
from r3_adapter.megatron.replay import prepare_step
from r3_adapter.megatron.replay_batch import StepInput
from r3_adapter.model_shapes import SHAPES
from r3_adapter.trace import RoutingTrace

_SAMPLE_TOKENS = 4096
_LIVE_EVERY = 10
"""One row in so many is routed live in the way that has such rows."""


@dataclass(frozen=True)
class Way:
    """How routers come by their experts, and dispatchers by the numbers of tokens.

    fused: moe_router_fusion. native: Megatron-core's own RouterReplay. given: routers are given experts, and with
    live_rows not for all rows. plan: the numbers are planned from the routes. copied: ids lie in the host's memory and
    are copied to the device in each call, as `prepare_step` copies those of all layers at once.
    """

    fused: bool = False
    native: bool = False
    given: bool = False
    live_rows: bool = False
    plan: bool = False
    copied: bool = False


def ways_of(*, gpu: bool) -> dict[str, Way]:
    """Return the ways that are compared. With a GPU replay has the flag of the fused router, as production has it."""
    ways = {
        "live": Way(),
        "live_fused": Way(fused=True),
        "native": Way(native=True),
        "replay": Way(fused=gpu, given=True, plan=True),
        "replay_unplanned": Way(fused=gpu, given=True),
        "replay_live_rows": Way(fused=gpu, given=True, live_rows=True),
        "live_again": Way(),
    }
    return {**ways, "replay_unfused": Way(given=True, plan=True)} if gpu else ways


def build_shape(shape: str, num_layers: int, layout: ParallelLayout, device: torch.device) -> Any:
    """Build a model with random weights on the device; fused experts and permutation where Megatron-core has them."""
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    hf = {**SHAPES[shape], "num_hidden_layers": num_layers}
    gpu = device.type == "cuda"
    fields = {
        "moe_grouped_gemm": bool(HAVE_TE),
        "moe_permute_fusion": gpu and bool(HAVE_TE),
        "use_cpu_initialization": not gpu,
    }
    torch.manual_seed(0)
    config = transformer_config(hf, layout, TrainerOptions(megatron_arguments=fields))
    return build_chunk(
        config,
        vocab_size=hf["vocab_size"],
        max_sequence_length=hf["max_position_embeddings"],
        rotary_base=rope_of(hf)["rope_theta"],
        tied=hf["tie_word_embeddings"],
        vp_stage=None,
    )


class Ways:
    """Calls of a router, a MoE layer and a step in each way, on the same inputs and with the model's own routes.

    left_out: ways that this machine has not, and why. answers: whether replay computes what live routing does.
    """

    def __init__(self, model: Any, num_tokens: int, device: torch.device) -> None:
        from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
        from megatron.core.transformer.moe.router_replay import RouterReplay

        self.model, self.device, self.num_tokens = model, device, num_tokens
        self.routers: list[Any] = [router for _, router in moe_routers(model)]
        self.num_experts, self.topk = model.config.num_moe_experts, model.config.moe_router_topk
        self._ways = ways_of(gpu=device.type == "cuda")
        self.left_out: dict[str, str] = {}
        if not HAVE_TE:
            self.left_out["live_fused"] = "no TransformerEngine, which has the fused router"
            del self._ways["live_fused"]
        self.answers: dict[str, bool | float] = {}
        self._natives = [RouterReplay() for _ in self.routers]
        RouterReplay.clear_global_router_replay_instances()
        self._arena = Arena()

    def router_calls(self, num_tokens: int) -> dict[str, Call]:
        """Return forward and backward of a router's function on given logits, [T, E] float32."""
        from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function as route

        generator = torch.Generator(device=self.device).manual_seed(1)
        shape = (num_tokens, self.num_experts)
        logits = torch.randn(shape, generator=generator, device=self.device).requires_grad_()
        weight = torch.randn(shape, generator=generator, device=self.device)
        own = logits.detach().topk(self.topk, dim=1).indices
        native = self._replaying(self._natives[0], own)

        ways = self._ways | {
            f"{name}_copied": replace(self._ways[name], copied=True) for name in ("replay", "replay_live_rows")
        }
        ids = {way: self._lying(self._given(own, way), way) for way in ways.values()}

        def both(way: Way) -> tuple[torch.Tensor, ...]:
            given = ids[way].to(self.device, non_blocking=True) if way.copied else ids[way]
            options: dict[str, Any] = {"routed_experts": given, "fused": way.fused}
            probs, routing_map = route(logits, self.topk, router_replay=native if way.native else None, **options)
            return routing_map, probs.detach(), *torch.autograd.grad(probs, logits, weight)

        want = both(Way())
        for name, way in ways.items():
            found = both(way)
            self.answers[f"router {num_tokens} {name}: map"] = torch.equal(found[0], want[0])
            for what, have, expected in (("probs", found[1], want[1]), ("gradient", found[2], want[2])):
                self.answers[f"router {num_tokens} {name}: {what}"] = float((have - expected).abs().max())
        return self._calls(both, ways)

    def layer_calls(self) -> dict[str, Call]:
        """Return forward and backward of the first MoE layer on given hidden states."""
        mlp = next(layer.mlp for layer in self.model.decoder.layers if layer.is_moe_layer)
        samples, length = self._samples()
        generator = torch.Generator(device=self.device).manual_seed(2)
        size = (length, samples, self.model.config.hidden_size)
        hidden = torch.randn(size, generator=generator, device=self.device).to(self.model.config.params_dtype)
        hidden, weight = hidden.requires_grad_(), torch.randn_like(hidden)
        with self._recorded() as maps, torch.no_grad():
            mlp(hidden)
        own = maps[0]
        counts = torch.bincount(own.flatten(), minlength=self.num_experts).to(torch.int32).cpu()[None]
        self._replaying(self._natives[0], own)
        ids = {way: self._given(own, way) for way in self._ways.values()}

        def both(way: Way) -> torch.Tensor:
            self._use(way)
            given = ids[way]
            arguments = {} if given is None else {"routed_experts": given}
            arguments |= {"routed_expert_counts": counts} if way.plan else {}
            output = mlp(hidden, **arguments)[0]
            output.backward(weight)
            hidden.grad = None
            mlp.zero_grad(set_to_none=True)
            return output.detach()  # type: ignore[no-any-return]

        self._compare("layer", both)
        return self._calls(both, self._ways)

    def step_calls(self) -> dict[str, Call]:
        """Return forward and backward of the model, where it replays with what `prepare_step` does on the host."""
        samples, length = self._samples()
        generator = torch.Generator(device=self.device).manual_seed(3)
        size, vocabulary = (samples, length), SHAPES["tiny"]["vocab_size"]
        tokens = torch.randint(0, vocabulary, size, generator=generator, device=self.device)
        positions = torch.arange(length, device=self.device).expand(samples, length).contiguous()
        with self._recorded() as maps, torch.no_grad():
            self.model(tokens, positions, None, labels=tokens)
        own = torch.stack(maps)
        for native, ids in zip(self._natives, own, strict=True):
            self._replaying(native, ids)
        inputs = {way: self._input(own, tokens, way) for way in self._ways.values() if way.given}

        def both(way: Way) -> torch.Tensor:
            self._use(way)
            self.model.zero_grad(set_to_none=True)
            arguments: dict[str, torch.Tensor] = {}
            if way in inputs:
                ((batch,),) = prepare_step([self.model], [inputs[way]], arena=self._arena, plan=way.plan)
                arguments = batch.model_arguments
            with nullcontext() if arguments else routed_live([self.model]):
                loss = self.model(tokens, positions, None, labels=tokens, **arguments).float().mean()
            loss.backward()
            return loss.detach()  # type: ignore[no-any-return]

        self._compare("step", both)
        return self._calls(both, self._ways)

    def _calls(self, both: Callable[[Way], Any], ways: Mapping[str, Way]) -> dict[str, Call]:
        return {name: lambda way=way: both(way) for name, way in ways.items()}  # type: ignore[misc]

    def _compare(self, part: str, both: Callable[[Way], torch.Tensor]) -> None:
        want = both(Way()).double()
        for name, way in self._ways.items():
            gap = (both(way).double() - want).abs().max() / want.abs().max()
            self.answers[f"{part} {name}: relative to live"] = float(gap)
            self.answers[f"{part} {name}: as live"] = bool(gap < 5e-2)

    def _samples(self) -> tuple[int, int]:
        """Return how many samples the tokens are, and their length."""
        length = min(self.num_tokens, _SAMPLE_TOKENS)
        if self.num_tokens % length:
            raise R3Error(f"{self.num_tokens} tokens are no whole number of samples of {length}")
        return self.num_tokens // length, length

    def _use(self, way: Way) -> None:
        self.model.config.moe_router_fusion = way.fused
        for router, native in zip(self.routers, self._natives, strict=True):
            router.router_replay = native if way.native else None

    def _given(self, own: torch.Tensor, way: Way) -> torch.Tensor | None:
        """Return what a router is given of its own ids, [T, K] int64."""
        if not way.given:
            return None
        if not way.live_rows:
            return own.to(torch.uint8 if self.num_experts <= 256 else torch.uint16)
        given = own.to(torch.int16)
        given[::_LIVE_EVERY] = -1
        return given

    def _lying(self, given: torch.Tensor | None, way: Way) -> Any:
        """Return ids, [T, K], where they lie before a call."""
        if given is None or not way.copied:
            return given
        return given.cpu().pin_memory() if self.device.type == "cuda" else given.cpu()

    def _replaying(self, native: Any, ids: torch.Tensor) -> Any:
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        native.clear_indices()
        native.set_target_indices(ids)
        native.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        return native

    @contextmanager
    def _recorded(self) -> Iterator[list[torch.Tensor]]:
        """Give a list that gets the ids, [T, K] int64, that each router selects for itself."""
        ids: list[torch.Tensor] = []
        hooks = [
            router.register_forward_hook(lambda _, __, out: ids.append(out[1].nonzero()[:, 1].view(-1, self.topk)))
            for router in self.routers
        ]
        self._use(Way())
        try:
            yield ids
        finally:
            for hook in hooks:
                hook.remove()

    def _input(self, own: torch.Tensor, tokens: torch.Tensor, way: Way) -> StepInput:
        """Return traces of the model's own routes, [M, T, K], tokens in the order of hidden states: [s, b]."""
        samples, length = tokens.shape
        rows = own.view(len(own), length, samples, self.topk).permute(2, 1, 0, 3).to(torch.uint16).cpu().numpy()
        layers = [layer for layer, _ in moe_routers(self.model)]
        traces = []
        for sample in range(samples):
            versions = torch.zeros(length, dtype=torch.int32).numpy()
            ids = rows[sample].astype("uint8" if self.num_experts <= 256 else "uint16")
            if way.live_rows:
                versions[::_LIVE_EVERY], ids[::_LIVE_EVERY] = -1, 0
            token_ids = tokens[sample].to(torch.int32).cpu().numpy()
            layer_ids = torch.tensor(layers, dtype=torch.int32).numpy()
            traces.append(RoutingTrace(ids, token_ids, versions, layer_ids, self.num_experts, ("random",)))
        return StepInput(traces, tokens)


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what the figures are of: the machine, and the versions of what computes."""
    machine: dict[str, Any] = {"machine": platform.machine(), "device": platform.processor() or "CPU"}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        machine |= {"device": found.name, "gib": round(found.total_memory / 2**30, 1), "driver": _driver()}
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "megatron-core", "transformer-engine", "triton", "r3_adapter"):
        versions[name] = version_of(name)
    return {"hardware": machine, "versions": versions}


def _driver() -> str:
    try:
        return gpu_driver()
    except (OSError, subprocess.SubprocessError) as error:
        print(f"nvidia-smi does not say the driver: {error}", file=sys.stderr)
        return "not known"
