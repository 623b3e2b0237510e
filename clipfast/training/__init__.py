"""Training: what ``clipfast train`` does.

``config`` holds the options, ``recipes`` sets of them, and ``command`` the command line. ``loop.train`` is the entry
point: it lets ``preflight`` refuse a run that cannot work, and ``trainer`` loop over the components of a run: ``build``
(model, loss, device), ``optim``, ``schedule`` (epochs and learning rate), ``ema``, ``data``, ``step``, ``validation``,
``logs`` and ``reports``, ``state`` (what a checkpoint holds, and how a run is continued), ``checkpoints`` (how it is
written, beside training in ``background``), ``run`` (its folder). ``guard`` skips steps whose gradient is not finite,
``spikes`` reports figures that are finite, but unusual, and ``ending`` has the errors and signals that end a run.
``world`` is the processes that train together, and ``watchdog`` names one that holds up the others. ``status`` reads
what a run has recorded. Only the options are imported here, so that ``--help`` needs no PyTorch.
"""

from .config import TrainConfig
from .recipes import list_recipes, read_recipe

__all__ = ["TrainConfig", "list_recipes", "read_recipe"]
