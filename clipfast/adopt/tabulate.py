"""The table of a patched model's modules, and the kernels on which they run."""

import collections
import re
from collections.abc import Iterator

from torch import nn

from ..io.text import align
from .apply import proposals
from .places import RECORD, Place, Proposal, check_module, reaches_ours

# The report's text about a module that was not replaced begins like this.
BEFORE = "as before: "


def report_places(model: nn.Module) -> str:
    """Tabulate the modules of a patched model with the kernels on which they run, or why they were not replaced.

    Args:
        model: a model after ``apply_to_open_clip``, ``apply_to_hf`` or ``apply_to_timm``.

    Returns:
        A line for each kind of module: its name, with ``*`` for the number of a block; the number of such modules; the
        argument of ``apply_to_...`` that switches their replacement on; and the kernel on which they run. Lines of
        modules that were not replaced say "as before" and the reason.

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
    """Return, for each switch of ``apply_to_...``, the number of modules on our kernels and the number of all.

    A module whose kernel runs only on GPUs counts on every device.
    """
    counts: dict[str, tuple[int, int]] = {}
    for _, kind, text in place_lines(model):
        ours, total = counts.get(kind, (0, 0))
        counts[kind] = (ours + (not text.startswith(BEFORE)), total + 1)
    return counts


def place_lines(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield each module with a proposal: its name, the switch to which it belongs, and the kernel on which it runs."""
    for prefix, part in _applied(model):
        yield from _lines(prefix, part)


def _applied(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the patched parts of ``model``, each with a prefix for the names of its modules."""
    parts = [(name, module) for name, module in model.named_modules() if RECORD in module.__dict__]
    if len(parts) == 1:  # the whole model, perhaps in a wrapper: names need no prefix
        return [("", parts[0][1])]
    return [(f"{name}." if name else "", module) for name, module in parts]


def _lines(prefix: str, part: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield name, kind and text of every recorded replacement in a patched part."""
    record: list[Place] = part.__dict__[RECORD]
    modules = dict(part.named_modules())
    # The modules are examined again, because a replacement runs the original if an adapter or a hook was added later.
    now = {(name, found.kind): found for name, _, found in proposals(part, {"attention": True, "norms": True})}
    for place in record:
        text = _current_text(place, modules, now.get((place.module, place.kind)))
        yield _starred(prefix + place.module), place.kind, text


def _starred(name: str) -> str:
    """Return the name of a patched module with ``*`` in place of each number; "(model)" for the model itself."""
    return re.sub(r"\d+", "*", name) or "(model)"


def _current_text(place: Place, modules: dict[str, nn.Module], proposal: Proposal | None) -> str:
    """Return the kernel on which a patched module runs now, since a later hook or adapter may change it."""
    if place.method is None:
        return f"{BEFORE}{place.text}"
    module = modules.get(place.module)
    if module is None:
        return f"{BEFORE}the module is gone"
    module = getattr(module, "base_layer", module)  # peft wraps a layer, and calls the layer inside
    if not reaches_ours(module, place.method):
        return f"{BEFORE}something else took the place of the module or its {place.method}"
    if proposal is not None and proposal.function is None:
        return f"{BEFORE}{proposal.text}"
    return place.text
