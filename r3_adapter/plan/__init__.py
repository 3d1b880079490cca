"""What a model, a layout and a run take, worked out without a GPU."""
