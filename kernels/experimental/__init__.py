"""Kernels that are off by default: compiled and predicted, never run."""
