"""The device that a command runs on."""

import torch


def resolve_device(name: str) -> str:
    """Return "cuda" or "cpu" for "auto", by whether there is a GPU, and any other name as it is."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
