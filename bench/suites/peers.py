"""Other people's implementations, where they are installed."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch

from ..case import MissingError

R = TypeVar("R")


def need(module: str, package: str) -> ModuleType:
    """Import ``module``, which ``pip install package`` gives.

    Raises:
        MissingError: it is not installed, or cannot be imported here.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name == module.split(".")[0]:
            raise MissingError(f"not installed (pip install {package})") from error
        raise MissingError(f"{package} cannot be imported: {error}") from error
    except Exception as error:
        # some peers ask for a GPU, or for another Triton, when they are imported
        raise MissingError(f"{package} cannot be imported: {type(error).__name__}: {error}") from error


def compiled(function: Callable[..., R]) -> Callable[..., R]:
    """``torch.compile`` of a candidate, for the shape at hand; ``harness.measure`` forgets those of earlier cases."""
    return torch.compile(function, dynamic=False)
