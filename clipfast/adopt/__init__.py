"""Kernels of this package for models of other libraries, in place.

``apply`` goes through a model. ``open_clip``, ``timm`` and ``hf`` say for each module of their library what can be done
with it, and hold the functions that do it; ``open_clip_towers`` and ``hf_towers`` do so for whole towers, ``hf_model``
for the losses of transformers, and ``parts`` for modules of PyTorch. ``last_row`` is the last block of a tower that
reads one row of it. ``places`` is how a method is replaced and given back, and ``tabulate`` makes a table of what was
done. The libraries' classes are recognised by their names, so that none has to be installed.
"""

from .apply import apply_to_hf, apply_to_open_clip, apply_to_timm
from .hf_model import hf_collator
from .places import revert_model
from .tabulate import count_places, place_lines, report_places

__all__ = [
    "apply_to_hf", "apply_to_open_clip", "apply_to_timm", "count_places", "hf_collator", "place_lines", "report_places",
    "revert_model",
]  # fmt: skip
