"""Signs of a run that goes wrong while all of its figures are finite; they are only reported."""

import dataclasses
import math

from ..models import CLIP
from .guard import Figures
from .train_config import TrainConfig

HORIZON = 200  # steps that the usual value is the mean of, the last ones more than those before
FIRST = 100  # steps before anything is judged
DEVIATIONS = 8.0  # so far above the usual value is a spike, if it is also as much more as LEAST says
LEAST = {"loss": 1.2, "gradient norm": 5.0}
LARGEST = 3.0  # deviations that a value may change the usual one by
SATURATED = 99.9  # of the factor of the cosines, which is kept at 100 at most
SATURATED_FOR = 500  # steps
BETTER = 0.98  # of the loss of guessing: a model whose loss is less has learned something
FLAT, FLAT_FOR = 1e-3, 50  # a gradient norm, and a share that the loss is off that of guessing; steps of a collapse
SENSIBLE = 1e4  # more is no weight of a model that works; half precision ends at 6.5e4
# Steps between two reports of the same sign.
PAUSE = {"loss": 100, "gradient norm": 100, "logit scale": 5000, "collapse": 5000}


@dataclasses.dataclass
class Usual:
    """The logarithm of a figure as it usually is: mean and mean deviation over the last steps."""

    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0

    def factor(self) -> float:
        """Return how many times the usual value is the least that is unusual."""
        return math.exp(DEVIATIONS * self.deviation)

    def take(self, value: float) -> None:
        """Take a value into the mean; one that is far off counts as one at the edge, so that a spike is soon over."""
        self.count += 1
        share = max(1 / HORIZON, 1 / self.count)
        change = value - self.mean
        if self.count > FIRST:
            limit = LARGEST * self.deviation
            change = min(max(change, -limit), limit)
        self.mean += share * change
        # The first value has nothing to deviate from.
        self.deviation += share * (abs(change) - self.deviation) if self.count > 1 else 0.0


def guessing(config: TrainConfig, model: CLIP, pairs: int) -> float | None:
    """Return the loss of a model that gives all pairs of a batch the same logit.

    It is None if other losses are added, or if there is one pair, which is no choice.
    """
    if config.distill_model is not None or pairs == 1:
        return None
    if getattr(model, "logit_bias", None) is None:
        return math.log(pairs)
    return math.log(pairs) - (pairs - 1) * math.log1p(-1 / pairs)  # SigLIP's, with the best logit of all


@dataclasses.dataclass
class Sign:
    """Something to be reported of a step."""

    kind: str
    text: str
    value: float
    usual: float


class Signs:
    """Looks at the figures of one step after the other.

    Args:
        warmup: steps of the schedule's rise, in which figures change fast and no spike is one.
        guessing: the loss of a model that gives all pairs the same logit; None if that is not known.

    Attributes:
        good: the last step whose loss was better than that; None if there was none.
        has_fallen: whether a step after it was one of a collapse.
    """

    def __init__(self, warmup: int, guessing: float | None = None) -> None:
        self.warmup, self.guessing = warmup, guessing
        self.good: int | None = None
        self.has_fallen = False
        self._flat = 0
        self._usual = {"loss": Usual(), "gradient norm": Usual()}
        self._saturated = 0
        self._reported: dict[str, int] = {}

    def see(self, step: int, figures: Figures) -> list[Sign]:
        """Return what is to be reported of ``step``, which counts from 1; the guard did not skip it."""
        found = []
        for kind, value in (("loss", figures.loss), ("gradient norm", figures.grad_norm)):
            usual = self._usual[kind]
            expected = math.exp(usual.mean)
            is_known = usual.count >= FIRST and step > self.warmup
            if is_known and value > expected * max(LEAST[kind], usual.factor()):
                text = f"the {kind} of step {step} is {value:.4g}, and was about {expected:.4g} before"
                found.append(Sign(kind, text, value, expected))
            if value > 0:
                usual.take(math.log(value))
        self._saturated = self._saturated + 1 if figures.logit_scale >= SATURATED else 0
        if self._saturated >= SATURATED_FOR:
            text = (
                f"the logit scale has been at its limit for {self._saturated} steps: a lower --lr or a larger batch "
                "would let it be less"
            )
            found.append(Sign("logit scale", text, figures.logit_scale, SATURATED))
        found += self._collapse(step, figures)
        return [sign for sign in found if self._is_news(sign.kind, step)]

    def _collapse(self, step: int, figures: Figures) -> list[Sign]:
        """Return a sign if the model has given all pairs the same features for a while, which no gradient undoes."""
        if self.guessing is None:
            return []
        if figures.loss < BETTER * self.guessing:
            self.good, self.has_fallen = step, False
        is_flat = abs(figures.loss - self.guessing) < FLAT * self.guessing and figures.grad_norm < FLAT
        self.has_fallen |= is_flat
        self._flat = self._flat + 1 if is_flat else 0
        if self._flat < FLAT_FOR:
            return []
        good = f"step {self.good} was the last good one" if self.good else "no step has been better"
        text = (
            f"the model has collapsed: for {self._flat} steps the loss is that of guessing, {figures.loss:.4f}, "
            f"with a gradient of {figures.grad_norm:.1e} and a logit scale of {figures.logit_scale:.3g}; {good}: go on "
            "from a checkpoint that is not later, or begin anew, with a lower --lr"
        )
        return [Sign("collapse", text, figures.loss, self.guessing)]

    def _is_news(self, kind: str, step: int) -> bool:
        last = self._reported.get(kind)
        if last is not None and step - last < PAUSE[kind]:
            return False
        self._reported[kind] = step
        return True
