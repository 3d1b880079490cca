"""A router of Megatron-core on this process alone, for the scripts beside this one; without a GPU too."""

import tempfile
from typing import Any

import torch


def make_router(num_experts: int, **options: Any) -> Any:
    """Return a TopKRouter of top-k 2 in training mode."""
    if not torch.cuda.is_available():
        from r3_adapter.megatron import cpu

        cpu.install()
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    method = f"file://{tempfile.mkdtemp()}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "num_moe_experts": num_experts}
    options = {"moe_router_topk": 2, "moe_router_load_balancing_type": "none", "add_bias_linear": False, **options}
    router = TopKRouter(TransformerConfig(**shape, **options), get_default_pg_collection())
    router.set_layer_number(1)
    return router.train()
