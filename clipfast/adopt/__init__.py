"""Kernels of this package for models of other libraries, in place.

``places`` is how a method of one module is replaced and given back. ``attention``, ``timm_attention``, ``norms``,
``mlps``, ``blocks`` and, for transformers, the files ``hf_*`` say what can be done with a module of somebody else's,
and hold the functions that do it. ``walk`` goes through a model, and ``report`` tabulates what was done. The libraries'
classes are recognised by their names, so that none has to be installed.
"""

from .places import revert
from .report import count_places, place_lines, report_places
from .walk import apply_to_hf, apply_to_open_clip, apply_to_timm

__all__ = [
    "apply_to_hf", "apply_to_open_clip", "apply_to_timm", "count_places", "place_lines", "report_places", "revert",
]  # fmt: skip
