"""Signs that training goes wrong while all figures are finite, such as loss spikes. They are only reported."""

import dataclasses
import math
from collections.abc import Callable

from ..data import BatchPlan
from ..models import CLIP
from .guard import Figures
from .train_config import TrainConfig

HORIZON = 200  # time constant in steps of the exponential mean that is the usual value
FIRST = 100  # steps at the beginning that are not judged
DEVIATIONS = 8.0  # a spike is this many deviations above the usual value, and also by the factor in LEAST
LEAST = {"loss": 1.2, "gradient norm": 5.0}
LARGEST = 3.0  # a value is clipped to this many deviations before it enters the mean
SATURATED = 99.9  # a logit scale from here on counts as saturated; training keeps it at 100 at most
SATURATED_FOR = 500  # steps of saturation before it is reported
BETTER = 0.98  # times the loss of guessing: a model with a lower loss has learned something
# In a collapse, the gradient norm and the relative distance of the loss from that of guessing are below FLAT,
# for FLAT_FOR steps in a row.
FLAT, FLAT_FOR = 1e-3, 50
SENSIBLE = 1e4  # weights of a model that works are smaller; half precision ends at 6.5e4
# The least number of steps between two reports of the same sign.
PAUSE = {"loss": 100, "gradient norm": 100, "logit scale": 5000, "collapse": 5000}


@dataclasses.dataclass
class Usual:
    """The usual value of a training figure: running mean and mean deviation of its logarithm over the last steps."""

    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0

    def factor(self) -> float:
        """Return the factor on the usual loss or gradient norm from which on a value is a spike."""
        return math.exp(DEVIATIONS * self.deviation)

    def take(self, value: float) -> None:
        """Update the running mean of a training figure by a value, which is clipped: one spike hardly counts."""
        self.count += 1
        share = max(1 / HORIZON, 1 / self.count)
        change = value - self.mean
        if self.count > FIRST:
            limit = LARGEST * self.deviation
            change = min(max(change, -limit), limit)
        self.mean += share * change
        # There is no mean yet from which the first value could deviate.
        self.deviation += share * (abs(change) - self.deviation) if self.count > 1 else 0.0


def guessing(config: TrainConfig, model: CLIP, plan: BatchPlan) -> Callable[[int], float] | None:
    """Return the loss of guessing of each step: that of a model that gives all pairs of the batch the same logit.

    It is None if other losses are added, or if batches have only one pair, which leaves nothing to choose.
    """
    if config.distill_model is not None or plan.largest == 1:
        return None
    is_siglip = getattr(model, "logit_bias", None) is not None

    def of(step: int) -> float:
        """Return the loss of guessing of a training step, counted from 1."""
        pairs = plan[step - 1].pairs
        # The sigmoid loss is that with the best constant logit.
        return math.log(pairs) - ((pairs - 1) * math.log1p(-1 / pairs) if is_siglip and pairs > 1 else 0.0)

    return of


@dataclasses.dataclass
class Sign:
    """A warning about a training step: its kind, its text, the value and the usual value."""

    kind: str
    text: str
    value: float
    usual: float


class Signs:
    """Looks for signs of trouble in the figures of one training step after the other.

    Args:
        warmup: number of warm-up steps, in which figures change fast and spikes are not reported.
        guessing: returns the loss of guessing of a step; None if it is not known. Losses of batches with different
            numbers of pairs are compared relative to it.

    Attributes:
        good: the last step whose loss was better than guessing; None if there was none.
        has_fallen: whether a step after ``good`` showed a collapse.
    """

    def __init__(self, warmup: int, guessing: Callable[[int], float] | None = None) -> None:
        self.warmup, self.guessing = warmup, guessing
        self.good: int | None = None
        self.has_fallen = False
        self._flat = 0
        self._usual = {"loss": Usual(), "gradient norm": Usual()}
        self._saturated = 0
        self._reported: dict[str, int] = {}

    def see(self, step: int, figures: Figures) -> list[Sign]:
        """Return the warnings about training step ``step``, which counts from 1 and was not skipped by the guard."""
        found, guess = [], None if self.guessing is None else self.guessing(step)
        for kind, value, unit in (("loss", figures.loss, guess or 1.0), ("gradient norm", figures.grad_norm, 1.0)):
            usual = self._usual[kind]
            expected = math.exp(usual.mean) * unit
            is_known = usual.count >= FIRST and step > self.warmup
            if is_known and value > expected * max(LEAST[kind], usual.factor()):
                text = f"the {kind} of step {step} is {value:.4g}, and was about {expected:.4g} before"
                found.append(Sign(kind, text, value, expected))
            if value > 0:
                usual.take(math.log(value / unit))
        self._saturated = self._saturated + 1 if figures.logit_scale >= SATURATED else 0
        if self._saturated >= SATURATED_FOR:
            text = (
                f"the logit scale has been at its limit for {self._saturated} steps: a lower --lr or a larger batch "
                "would let it be less"
            )
            found.append(Sign("logit scale", text, figures.logit_scale, SATURATED))
        found += [] if guess is None else self._collapse(step, figures, guess)
        return [sign for sign in found if self._is_news(sign.kind, step)]

    def _collapse(self, step: int, figures: Figures, guess: float) -> list[Sign]:
        """Return a warning if training has collapsed: for a while, all pairs had equal features and no gradient."""
        if figures.loss < BETTER * guess:
            self.good, self.has_fallen = step, False
        is_flat = abs(figures.loss - guess) < FLAT * guess and figures.grad_norm < FLAT
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
        return [Sign("collapse", text, figures.loss, guess)]

    def _is_news(self, kind: str, step: int) -> bool:
        """Return True unless a warning of this kind about training was given a short time ago."""
        last = self._reported.get(kind)
        if last is not None and step - last < PAUSE[kind]:
            return False
        self._reported[kind] = step
        return True
