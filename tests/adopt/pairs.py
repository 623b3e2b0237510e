"""Helpers for tests of adopted models: a small model of any library, its patched copy, and comparisons of the two."""

import copy

import pytest
import torch
from torch import nn

import clipfast
from clipfast.adopt.places import Replacement

from . import hf_models, shrunk

PARTS = ["attention", "norms", "activations", "patch_embed", "text_embed", "pooled_last_block", "pack_text"]
HF_PARTS = [*PARTS, "loss"]
HF_NAMES = ["clip", "siglip", "siglip2"]
Given = dict[str, torch.Tensor] | None
TRAINING = {"loss_only": True, "return_loss": True}  # arguments of hf_models.results


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Make a model of transformers, timm or OpenCLIP to adopt."""
    if name in hf_models.PAIRS + hf_models.TOWERS:
        pytest.importorskip("transformers")
        return hf_models.make(name).to(dtype)
    make = shrunk.timm_model if name in shrunk.TIMM_MODELS else shrunk.open_clip_model
    return make(name).to(dtype)


def is_hf(model: nn.Module) -> bool:
    """Return True if an adopted model comes from transformers."""
    return type(model).__module__.startswith("transformers.")


def patch(model: nn.Module, **flags: bool) -> nn.Module:
    """Replace parts of a model by clipfast's ops, with the ``apply_to_...`` function for the model's library."""
    if is_hf(model):
        return clipfast.apply_to_hf(model, **flags)
    return (clipfast.apply_to_open_clip if hasattr(model, "visual") else clipfast.apply_to_timm)(model, **flags)


def pair(name: str, dtype: torch.dtype = torch.float64, **flags: bool) -> tuple[nn.Module, nn.Module]:
    """Return a small model of another library, and a copy of it that was patched to run on clipfast's ops."""
    model = made(name, dtype)
    return model, patch(copy.deepcopy(model), **flags)


def results(model: nn.Module, given: Given = None, **options: object) -> dict[str, torch.Tensor]:
    """Return outputs and gradients of an original or a patched model by name, for the same inputs in every call.

    The inputs ``given`` and the ``options`` are only for a model of transformers.
    """
    if is_hf(model):
        return hf_models.results(model, given or hf_models.inputs(model, "end"), **options)
    torch.manual_seed(5)
    return shrunk.results(model, *shrunk.inputs(model))


def assert_equal(
    model: nn.Module, patched: nn.Module, limit: float = 1e-10, given: Given = None, **options: object
) -> None:
    """Check that a model and its patched copy have equal outputs and gradients, and for transformers equal losses."""
    for one in ({}, TRAINING) if is_hf(model) else ({},):
        assert_equal_results(model, patched, limit, given, **one, **options)


def assert_equal_results(
    model: nn.Module, patched: nn.Module, limit: float = 1e-10, given: Given = None, **options: object
) -> None:
    """Check that a model and its patched copy have equal outputs and gradients in one call."""
    worst, where = shrunk.largest_error(*(results(each, given, **options) for each in (patched, model)))
    assert worst <= limit, where


def error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest error of a patched model's results, relative to the largest value of each tensor."""
    return shrunk.largest_error(ours, theirs)[0]


def call(model: nn.Module) -> object:
    """Call an original or a patched model of transformers or OpenCLIP with the same inputs each time."""
    torch.manual_seed(5)
    return model(**hf_models.inputs(model, "end")) if is_hf(model) else model(*shrunk.inputs(model))


def replacements(model: nn.Module) -> list[Replacement]:
    """Return the :class:`Replacement` of every part of an adopted model that runs on clipfast's ops."""
    return [value for module in model.modules() for value in module.__dict__.values() if isinstance(value, Replacement)]


def lines(model: nn.Module, part: str) -> list[str]:
    """Return the lines that ``report_kernels`` writes about one part of a patched model."""
    return [line for line in clipfast.report_kernels(model).splitlines() if line.split()[2] == part]
