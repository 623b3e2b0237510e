"""The table of what each place of a model runs on."""

import re

from torch import nn

from .places import RECORD, Place, Proposal, Replacement, check_module, runs_ours
from .walk import proposals


def report_places(model: nn.Module) -> str:
    """Tabulate what each place of a model of another library runs on, or why it was left alone.

    Args:
        model: to which ``apply_to_open_clip`` or ``apply_to_timm`` was applied.

    Returns:
        A line for each kind of place: its name, with ``*`` for the number of a block, how many there are, what they
        belong to, and what they run on. Whatever was left alone is in the lines that say "as before".

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module("report", model)
    # a wrapper, such as a compiled model, keeps no record itself
    model = next((module for module in model.modules() if RECORD in module.__dict__), model)
    places = _places(model)
    if not places:
        return "nothing of this model runs on clipfast: see clipfast.apply_to_open_clip and clipfast.apply_to_timm"
    modules = dict(model.named_modules())
    # What was put somewhere gives way, at each call, to what has been put there since: an adapter, a hook.
    now = {(name, found.kind): found for name, _, found in proposals(model, {"attention": True, "norms": True})}
    counts: dict[tuple[str, str, str], int] = {}
    for place in places:
        line = (
            re.sub(r"\d+", "*", place.module) or "(model)",
            place.kind,
            _now(place, modules, now.get((place.module, place.kind))),
        )
        counts[line] = counts.get(line, 0) + 1
    rows = [("place", "number", "part", "runs on")]
    rows += [(name, str(number), kind, text) for (name, kind, text), number in counts.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {number:>{widths[1]}}  {kind:<{widths[2]}}  {text}" for name, number, kind, text in rows
    )


def _places(model: nn.Module) -> list[Place]:
    """Return the places on record; of a part of a model, which has no record, those that are replaced."""
    recorded: list[Place] | None = model.__dict__.get(RECORD)
    if recorded is not None:
        return recorded
    return [
        Place(name, "replaced", method, value.function.__name__)
        for name, module in model.named_modules()
        for method, value in module.__dict__.items()
        if isinstance(value, Replacement)
    ]


def _now(place: Place, modules: dict[str, nn.Module], proposal: Proposal | None) -> str:
    """Return what the place runs on now, which a later replacement may have changed."""
    if place.method is None:
        return f"as before: {place.text}"
    module = modules.get(place.module)
    if module is None:
        return "as before: the module is gone"
    if not runs_ours(module, place.method):
        return f"as before: something else took the place of the module or its {place.method}"
    if proposal is not None and proposal.function is None:
        return f"as before: {proposal.text}"
    return place.text
