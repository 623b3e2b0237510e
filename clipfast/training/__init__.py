"""Training: its options (``config``), the loop (``loop``), the run's folder (``run``), and AdamW with its schedule.

``clipfast.training.loop.train`` is the entry point; it is not imported here, so that ``--help`` does without it.
"""

from .config import TrainConfig, list_recipes, read_recipe

__all__ = ["TrainConfig", "list_recipes", "read_recipe"]
