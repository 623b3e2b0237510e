"""Training: what ``clipfast train`` does.

``config`` holds the options and ``command`` the command line. ``loop.train`` is the entry point: it lets ``preflight``
refuse a run that cannot work, and ``trainer`` loop over the components of a run: ``build`` (model, optimizer, device),
``data``, ``step``, ``logs``, ``state`` (what a checkpoint holds, and how a run is continued) and ``run`` (its folder).
Only the options are imported here, so that ``--help`` needs no PyTorch.
"""

from .config import TrainConfig, list_recipes, read_recipe

__all__ = ["TrainConfig", "list_recipes", "read_recipe"]
