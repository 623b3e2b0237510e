"""Training: the implementation of ``clipfast train``.

``train_config`` holds the options, ``option_checks`` their limits, and ``recipes`` sets of them. ``loop.train`` is the
entry point: it lets ``preflight`` refuse a run that cannot work, and ``trainer`` loop over the components of a run:
``build`` (model, loss, device), ``optim``, ``schedule`` (epochs and learning rate), ``ema``, ``data``, ``step``,
``validation``, ``logs`` and ``reports``, ``state`` (the content of a checkpoint, and how a run is continued). ``guard``
skips steps whose gradient is not finite, and ``spikes`` reports figures that are finite, but unusual. Checkpoints are
written by ``clipfast.checkpoints.of_run``, into a folder that ``clipfast.runs`` describes; the processes that train
together are ``clipfast.distributed``. Only the options are imported here, so that ``--help`` needs no PyTorch.
"""

from .recipes import list_recipes, read_recipe
from .train_config import TrainConfig

__all__ = ["TrainConfig", "list_recipes", "read_recipe"]
