"""The self-test: a rollout with perturbed experts, replayed in the trainer, and the verdict on it."""
