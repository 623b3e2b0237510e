"""Training: what ``clipfast train`` does.

``config`` holds the options, ``recipes`` sets of them, and ``command`` the command line. ``loop.train`` is the entry
point: it lets ``preflight`` refuse a run that cannot work, and ``trainer`` loop over the components of a run: ``build``
(model, loss, device), ``optim``, ``schedule``, ``ema``, ``data``, ``step``, ``logs`` with ``meters`` and ``reports``,
``state`` (what a checkpoint holds, and how a run is continued) and ``run`` (its folder). ``guard`` skips steps whose
gradient is not finite, and ``nonfinite`` writes them down; ``spikes`` reports figures that are finite, but unusual.
``world`` is the processes that train together, and ``watchdog`` names one that holds up the others. ``history`` and
``status`` read what a run has recorded. Only the options are imported here, so that ``--help`` needs no PyTorch.
"""

from .config import TrainConfig
from .recipes import list_recipes, read_recipe

__all__ = ["TrainConfig", "list_recipes", "read_recipe"]
