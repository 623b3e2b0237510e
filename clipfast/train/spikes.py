"""Signs that training goes wrong while loss and gradients are finite, such as loss spikes. They are only reported."""

import dataclasses
import math
from collections.abc import Callable

from ..data import BatchPlan
from ..models import CLIP
from .guard import Figures
from .train_config import TrainConfig

# The logarithm of a metric has a running mean, the "usual value", and a running mean deviation from it.
HORIZON = 200  # time constant of both running means in steps
FIRST = 100  # number of steps at the start of a session in which no spike is reported, as the means are inaccurate
# A spike is at least DEVIATIONS mean deviations above the usual value, and at least LEAST times the usual value.
DEVIATIONS = 8.0
LEAST = {"loss": 1.2, "gradient norm": 5.0}
LARGEST = 3.0  # a value is clipped to this many deviations from the mean before it updates the mean
SATURATED = 99.9  # a logit scale of at least this counts as saturated; training clamps it to 100
SATURATED_FOR = 500  # a saturated logit scale is reported after this many steps in a row
BETTER = 0.98  # a model has learned something if its loss is below this fraction of the loss of guessing
# A model has collapsed if for FLAT_FOR steps in a row the gradient norm is below FLAT, and the loss differs from the
# loss of guessing by a fraction of less than FLAT.
FLAT, FLAT_FOR = 1e-3, 50
SENSIBLE = 1e4  # all weights of a working model are smaller; the largest float16 is 6.5e4
# The least number of steps between two reports of the same sign.
PAUSE = {"loss": 100, "gradient norm": 100, "logit scale": 5000, "collapse": 5000}


@dataclasses.dataclass
class Usual:
    """The usual value of the loss or gradient norm: running mean and mean deviation of its logarithm."""

    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0

    def factor(self) -> float:
        """Return how many times the usual loss or gradient norm a value must be to count as a spike."""
        return math.exp(DEVIATIONS * self.deviation)

    def take(self, value: float) -> None:
        """Update the means by the logarithm of a loss or gradient norm, clipped so that a spike hardly counts."""
        self.count += 1
        share = max(1 / HORIZON, 1 / self.count)
        change = value - self.mean
        if self.count > FIRST:
            limit = LARGEST * self.deviation
            change = min(max(change, -limit), limit)
        self.mean += share * change
        # The first value sets the mean, so its deviation from the mean says nothing.
        self.deviation += share * (abs(change) - self.deviation) if self.count > 1 else 0.0


def guessing(config: TrainConfig, model: CLIP, plan: BatchPlan) -> Callable[[int], float] | None:
    """Return a function from a step to its loss of guessing: that of a model that gives all pairs the same logit.

    Return None if the loss includes distillation, or if batches have only one pair, so that there is nothing to guess.
    """
    if config.distill_model is not None or plan.largest == 1:
        return None
    is_siglip = getattr(model, "logit_bias", None) is not None

    def of(step: int) -> float:
        """Return the loss of guessing of a training step, counted from 1."""
        pairs = plan[step - 1].pairs
        # For SigLIP, this is the sigmoid loss with the constant logit that makes it smallest.
        return math.log(pairs) - ((pairs - 1) * math.log1p(-1 / pairs) if is_siglip and pairs > 1 else 0.0)

    return of


@dataclasses.dataclass
class Sign:
    """A warning about a training step: its kind, such as "loss", its text, the metric's value and its usual value."""

    kind: str
    text: str
    value: float
    usual: float


class Signs:
    """Looks for signs of trouble in the metrics of one training step after the other.

    Args:
        warmup: number of warm-up steps, in which losses change fast and spikes are not reported.
        guessing: returns the loss of guessing of a step; None if it is not known. Losses are divided by it, so that
            batches with different numbers of pairs can be compared.

    Attributes:
        good: the last step whose loss was better than guessing; None if there was none.
        has_fallen: whether loss and gradient of a step after ``good`` were those of a collapsed model.
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
        """Return a warning if the model has collapsed: the loss stays at that of guessing, with hardly any gradient."""
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
        """Return True, and note the step, unless training gave a warning of this kind a short time ago."""
        last = self._reported.get(kind)
        if last is not None and step - last < PAUSE[kind]:
            return False
        self._reported[kind] = step
        return True
