"""What a training step on many GPUs will need, predicted by running the step of one rank on fake tensors."""
