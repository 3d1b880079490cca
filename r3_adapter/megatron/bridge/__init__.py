"""Models of every family that megatron-bridge knows, in place of our table of weights, where it is installed."""
