"""A tiny GPT of real Megatron on this process alone, for the programs that test_megatron_router.py starts.

T: tokens; L: decoder layers; M: MoE layers; K: experts a token; E: experts of a layer.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from r3_adapter.megatron import cpu

cpu.install()
torch.set_num_threads(1)

from megatron.core import parallel_state as ps  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

SEQ, BATCH, EXPERTS, TOPK, VOCAB, HIDDEN = 16, 2, 8, 2, 64, 32
LAYERS = (0, 1, 1, 1)
MOE_LAYERS, TOKENS = sum(LAYERS), SEQ * BATCH

SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5}
BIAS = {**SIGMOID, "moe_router_enable_expert_bias": True}
ROUTERS: Mapping[str, Mapping[str, Any]] = {
    "softmax": {},
    "pre_softmax": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 1.5},
    "sigmoid": SIGMOID,
    "bias": BIAS,
    "groups": {**BIAS, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
    "fp64": {"moe_router_dtype": "fp64"},
    "jitter_z_loss": {"moe_input_jitter_eps": 0.05, "moe_z_loss_coeff": 0.01},
    "aux_loss": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
    "all_aux_losses": {
        **SIGMOID,
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.2, 0.3],
    },
    "shared_experts": {"moe_shared_expert_intermediate_size": 16},
}
BIAS_AND_AUX = {**BIAS, "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}
RECOMPUTE: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe", "mlp"]},
}


said: dict[str, Any] = {}
"""What became of each case of a script, which it prints last."""


def told(name: str, call: Callable[[], object]) -> None:
    """Keep what a call raises."""
    try:
        call()
        said[name] = "done"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"


def start() -> None:
    """Set up Megatron's groups for one process."""
    rendezvous = Path(tempfile.mkdtemp(), "rendezvous")
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    ps.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)


def configure(num_layers: int, **options: Any) -> TransformerConfig:
    """Return the configuration of a tiny model, of a hybrid one or not."""
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=64,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=32,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        **{
            "moe_router_topk": TOPK,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            **options,
        },
    )


def build(**options: Any) -> torch.nn.Module:
    """Build the model, of a dense layer and three MoE layers; the same weights each time."""
    torch.manual_seed(7)
    config = configure(len(LAYERS), moe_layer_freq=list(LAYERS), **options)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    model = GPTModel(config, spec, VOCAB, SEQ, position_embedding_type="rope").train()
    for router in routers(model):
        router.weight.data.mul_(10)
        if router.expert_bias is not None:
            router.expert_bias += torch.linspace(-0.2, 0.2, EXPERTS)
    return model


def routers(model: torch.nn.Module) -> list[Any]:
    """Return the routers of the MoE layers, in order."""
    return [layer.mlp.router for layer in model.decoder.layers if layer.is_moe_layer]


def forward(model: torch.nn.Module, **arguments: Any) -> torch.Tensor:
    """Return the [b, s] losses of a fixed micro-batch; the generator starts anew, for the jitter."""
    torch.manual_seed(11)
    return _losses(model, torch.randint(0, VOCAB, (BATCH, SEQ)), **arguments)


def _losses(model: torch.nn.Module, tokens: torch.Tensor, **arguments: Any) -> torch.Tensor:
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    mask = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).triu(1)
    return model(tokens, positions, mask, labels=tokens.roll(-1, 1), **arguments)


def loop(chunks: list[Any], micro_batches: list[Any], forward_only: bool = False) -> None:
    """Run a pass by Megatron's schedule, as any framework does; its forward_step knows no routes.

    chunks: of this rank. micro_batches: StepInput each.
    """

    def forward_step(iterator: Iterator[Any], module: Any) -> Any:
        return _losses(module, next(iterator).tokens), lambda losses: (losses.mean(), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(micro_batches),
        seq_length=SEQ,
        micro_batch_size=BATCH,
        forward_only=forward_only,
    )


def outcome(model: torch.nn.Module, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the backward pass; return losses, all gradients, and the counts that drive the expert bias."""
    losses.mean().backward()
    found = {"losses": losses.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[f"grad {name}"] = parameter.grad
    for index, router in enumerate(routers(model)):
        if router.local_tokens_per_expert is not None:
            found[f"tokens per expert {index}"] = router.local_tokens_per_expert.clone()
    return found


def step(model: torch.nn.Module, **arguments: Any) -> dict[str, torch.Tensor]:
    """Run one forward and backward pass; arguments are those of GPTModel.forward."""
    return outcome(model, forward(model, **arguments))


def own_experts(model: torch.nn.Module) -> torch.Tensor:
    """Return what the model's routers select live for the micro-batch: [M, T, K] int16, ids ascending in a row."""
    maps: list[torch.Tensor] = []
    hooks = [router.register_forward_hook(lambda *call: maps.append(call[2][1])) for router in routers(model)]
    with torch.no_grad():
        forward(model)
    for hook in hooks:
        hook.remove()
    return torch.stack([found.nonzero()[:, 1].view(TOKENS, -1) for found in maps]).to(torch.int16)


def random_experts(seed: int = 0) -> torch.Tensor:
    """Return distinct ids in each row: [M, T, K] int16."""
    noise = torch.rand(MOE_LAYERS, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(2)[..., :TOPK].to(torch.int16)
