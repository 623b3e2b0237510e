"""The table of what each place of a model runs on."""

import collections
import re
from collections.abc import Iterator

from torch import nn

from ..io.text import align
from .apply import proposals
from .places import RECORD, Place, Proposal, check_module, reaches_ours

# The text of a place that was left alone begins like this.
BEFORE = "as before: "


def report_places(model: nn.Module) -> str:
    """Tabulate what each place of a model of another library runs on, or why it was left alone.

    Args:
        model: to which ``apply_to_open_clip``, ``apply_to_hf`` or ``apply_to_timm`` was applied.

    Returns:
        A line for each kind of place: its name, with ``*`` for the number of a block, how many there are, what they
        belong to, and what they run on. Whatever was left alone is in the lines that say "as before".

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module("report_kernels", model)
    lines = list(place_lines(model))
    if not lines:
        return (
            "nothing of this model runs on clipfast: give the model to clipfast.apply_to_open_clip, apply_to_hf or "
            "apply_to_timm, and all of it to clipfast.report_kernels"
        )
    rows = [(name, number, kind, text) for (name, kind, text), number in collections.Counter(lines).items()]
    return align([("place", "number", "part", "runs on"), *rows], right=(1,))


def count_places(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return how many places run on our kernels and how many there are, by the switch that they belong to.

    A place that has a kernel for GPUs only counts on every device.
    """
    counts: dict[str, tuple[int, int]] = {}
    for _, kind, text in place_lines(model):
        ours, total = counts.get(kind, (0, 0))
        counts[kind] = (ours + (not text.startswith(BEFORE)), total + 1)
    return counts


def place_lines(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield each place that something was proposed for: its name, the part that it belongs to, and what it runs on."""
    for prefix, part in _applied(model):
        yield from _lines(prefix, part)


def _applied(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the parts of ``model`` that something was applied to, with a prefix for the names of their places."""
    parts = [(name, module) for name, module in model.named_modules() if RECORD in module.__dict__]
    if len(parts) == 1:  # the model, or the model in a wrapper
        return [("", parts[0][1])]
    return [(f"{name}." if name else "", module) for name, module in parts]


def _lines(prefix: str, part: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield place, kind and text of everything on the record of ``part``."""
    record: list[Place] = part.__dict__[RECORD]
    modules = dict(part.named_modules())
    # A replacement gives way, at each call, to an adapter or a hook that has been put in its place since.
    now = {(name, found.kind): found for name, _, found in proposals(part, {"attention": True, "norms": True})}
    for place in record:
        text = _now(place, modules, now.get((place.module, place.kind)))
        yield _place(prefix + place.module), place.kind, text


def _place(name: str) -> str:
    return re.sub(r"\d+", "*", name) or "(model)"


def _now(place: Place, modules: dict[str, nn.Module], proposal: Proposal | None) -> str:
    """Return which kernel the place runs on now; a hook or an adapter that was added later may have changed it."""
    if place.method is None:
        return f"{BEFORE}{place.text}"
    module = modules.get(place.module)
    if module is None:
        return f"{BEFORE}the module is gone"
    module = getattr(module, "base_layer", module)  # peft wraps a layer, and calls it
    if not reaches_ours(module, place.method):
        return f"{BEFORE}something else took the place of the module or its {place.method}"
    if proposal is not None and proposal.function is None:
        return f"{BEFORE}{proposal.text}"
    return place.text
