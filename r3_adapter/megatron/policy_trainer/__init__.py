"""A trainer of our own for policies, on Megatron-core: what it is asked, its model, weights, steps and checkpoints."""
