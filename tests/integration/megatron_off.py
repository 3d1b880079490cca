"""Train steps that are given no routes, each option that the patches are about on once.  python megatron_off.py OUT"""

import sys

import hybrid_tiny as hybrid
import megatron_tiny as tiny
from safetensors.torch import save_file

tiny.start()
found = {}
for router, options in {**tiny.ROUTERS, "bias_and_aux": tiny.BIAS_AND_AUX}.items():
    for name, recompute in tiny.RECOMPUTE.items():
        if name == "none" or router in ("bias_and_aux", "shared_experts"):
            result = tiny.step(tiny.build(**options, **recompute))
            found.update({f"{router} {name} {key}": value.contiguous() for key, value in result.items()})
for name in tiny.RECOMPUTE if hybrid.NAMED else ("none", "moe"):
    model = hybrid.build(hybrid.BLOCKS, **tiny.RECOMPUTE[name])
    losses = tiny.forward(model)
    losses.mean().backward()
    found[f"hybrid {name} losses"] = losses.detach().contiguous()
    found.update({f"hybrid {name} grad {key}": each.grad.contiguous() for key, each in model.named_parameters()})
save_file(found, sys.argv[1])
