"""Predict memory and time of a training step on many GPUs, by running the step of one rank on fake tensors."""
