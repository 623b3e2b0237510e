"""What the contrastive loss of a batch will need: memory, FLOPs, bytes on the wire and time of each mode, predicted.

``formulas`` counts, ``scratch`` knows what the blocks of each device hold for a while, ``machine`` has the rates,
``predict`` makes times of counts, ``measure`` and ``check`` hold the counts to a run, ``command`` is ``clipfast plan``.
"""

from .formulas import MODES_OF_MANY, MODES_OF_ONE, OPENCLIP, Problem, flops, memory, traffic
from .machine import CARDS, Machine
from .predict import Prediction, largest_pairs, predict, predict_all

__all__ = [
    "CARDS",
    "MODES_OF_MANY",
    "MODES_OF_ONE",
    "OPENCLIP",
    "Machine",
    "Prediction",
    "Problem",
    "flops",
    "largest_pairs",
    "memory",
    "predict",
    "predict_all",
    "traffic",
]
