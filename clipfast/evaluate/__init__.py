"""Evaluation of a checkpoint without training on the task: zero-shot classification and image-text retrieval."""
