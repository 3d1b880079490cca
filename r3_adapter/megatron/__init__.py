"""The training side: replay in Megatron-core, this project's own trainer, and what lets it run without a GPU."""
