"""Patches models of OpenCLIP, transformers and timm in place, to run on the kernels of this package.

``apply`` goes through the modules of a model. ``open_clip``, ``timm`` and ``hf`` propose a replacement for each module
of their library, and hold the functions that replace its methods; ``open_clip_towers`` and ``hf_towers`` do the same
for whole towers, ``naflex_vit`` for timm's NaFlexVit, ``hf_model`` for transformers' losses, and ``parts`` for
PyTorch's modules. ``last_row`` computes one row of a tower's last block, and ``packable`` says which towers take packed
texts. ``places`` replaces and restores methods, and ``tabulate`` makes a table of the replacements. The libraries'
classes are recognised by their names, and so no library has to be installed.
"""

from .apply import apply_to_hf, apply_to_open_clip, apply_to_timm
from .hf_model import hf_collator
from .places import revert_model
from .tabulate import count_places, place_lines, report_places

__all__ = [
    "apply_to_hf", "apply_to_open_clip", "apply_to_timm", "count_places", "hf_collator", "place_lines", "report_places",
    "revert_model",
]  # fmt: skip
