"""Linear probes: logistic regression with an L2 penalty, by scikit-learn or in PyTorch on any device.

Over a training set of N samples, both minimise

    mean of cross_entropy(x @ weights + bias)  +  |weights|^2 / (2 * C * N)

With two classes scikit-learn has one column of weights. The same as two columns, w / 2 and -w / 2, it has half the
norm, so that the penalty is twice as large. C is searched as in Radford et al. 2021, appendix A.3.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..io.progress import each
from .classification import Classified, classify, metrics
from .features import LabelledFeatures

# The values of C that can be chosen: 12 decades with 8 steps each.
VALUES = tuple(10.0 ** (step / 8 - 6) for step in range(97))
FIRST_STEP = 16  # two decades
VALIDATION_SHARE = 0.2  # of the training set, without a validation set
MAX_ITERATIONS = 1000
TOLERANCE = 1e-6  # of the gradient in the coordinates of TorchSolver, in which weights are about as large as min(1, C)
FIRST = 100  # iterations after which weights are scaled anew, for the first time, and then after twice as many
HISTORY = 10  # pairs of steps and changes of the gradient that L-BFGS remembers
BLOCK = 2**24  # scores that are held at a time


class Samples(NamedTuple):
    """Features [N, D] and the numbers of their classes [N], on the CPU."""

    features: Tensor
    classes: Tensor

    def take(self, numbers: Tensor) -> Samples:
        """Return some of the samples."""
        return Samples(self.features[numbers], self.classes[numbers])

    def and_those_of(self, others: Samples) -> Samples:
        """Return these samples and others."""
        return Samples(*(torch.cat(pair) for pair in zip(self, others, strict=True)))


class Classifier(NamedTuple):
    """A linear classifier.

    Attributes:
        weights: float64 [D + 1, K], of which the last row is the bias.
        iterations: of the solver.
        converged: False if it was stopped after so many.
    """

    weights: Tensor
    iterations: int
    converged: bool

    def classify(self, samples: Samples, classnames: Sequence[str]) -> Classified:
        """Return what the classifier makes of samples."""
        x = samples.features.to(self.weights)
        labels = [classnames[number] for number in samples.classes.tolist()]
        return classify(torch.cat([x, x.new_ones(len(x), 1)], 1), labels, classnames, self.weights)


def samples_of(found: LabelledFeatures, classnames: Sequence[str], name: str) -> Samples:
    """Return the features of a set with the numbers of their classes.

    Args:
        found: the set.
        classnames: of the training set.
        name: the name of the set, for error messages.

    Raises:
        ValueError: there is a label that is not in the training set, or a feature is not finite.
    """
    numbers = {label: number for number, label in enumerate(classnames)}
    unknown = Counter(label for label in found.labels if label not in numbers)
    if unknown:
        label, count = unknown.most_common(1)[0]
        raise ValueError(
            f"{name} has {len(unknown)} labels that the training set lacks, such as {label!r} ({count} images): "
            "train on all classes, or name the right key by --label-by"
        )
    if not found.features.isfinite().all():
        raise ValueError(f"features of {name} contain NaN or infinity")
    return Samples(found.features.cpu(), torch.tensor([numbers[label] for label in found.labels]))


def split(train: Samples, seed: int) -> tuple[Samples, Samples]:
    """Return a training and a validation set: a fifth of each class, at least one image if it has two.

    Raises:
        ValueError: no class has two images.
    """
    kept, taken = [], []
    for members in members_of_classes(train, seed):
        count = max(round(VALIDATION_SHARE * len(members)), min(1, len(members) - 1))
        taken.append(members[:count])
        kept.append(members[count:])
    if not sum(map(len, taken)):
        raise ValueError("no class has two training images, one of which could choose C: give --val-data or --C")
    return train.take(torch.cat(kept)), train.take(torch.cat(taken))


def members_of_classes(train: Samples, seed: int) -> list[torch.Tensor]:
    """Return the numbers of the images of each class, in an order drawn by a seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.classes), generator=generator)
    by_class = order[train.classes[order].argsort(stable=True)]
    return list(by_class.split(torch.bincount(train.classes).tolist()))


class TorchSolver:
    """L-BFGS in coordinates in which the objective is curved about equally in all directions.

    Features of an image encoder have a large mean and few directions that vary, so that plain L-BFGS needs many more
    iterations. The optimum does not depend on the coordinates: the bias takes up the mean, and a rotation, here to the
    principal directions, keeps the norm of the weights. Each weight is then scaled by the curvature along it, once in a
    while.

    Args:
        train: the training set; each class has a sample.
        device: that it is moved to.
    """

    def __init__(self, train: Samples, device: str | torch.device = "cpu") -> None:
        x = train.features.to(device, torch.float64)
        self.classes = train.classes.to(device)
        self.num_classes = int(train.classes.max()) + 1
        self.mean = x.mean(0)
        x = x - self.mean
        self.directions = torch.linalg.eigh(x.T @ x).eigenvectors
        # the last column is the bias's
        self.inputs = torch.cat([x @ self.directions, x.new_ones(len(x), 1)], 1)

    def fit(self, C: float) -> Classifier:
        """Return the classifier for an inverse strength of the penalty."""
        weight = C / 2 if self.num_classes == 2 else C
        solution = self.inputs.new_zeros(self.inputs.shape[1], self.num_classes)
        iterations, most, converged = 0, FIRST, False
        while not converged and iterations < MAX_ITERATIONS:
            most = min(most, MAX_ITERATIONS - iterations)
            solution, done = self._minimize(solution, weight, most)
            iterations, most, converged = iterations + done, 2 * most, done < most
        weights = self.directions @ solution[:-1]
        bias = solution[-1:] - self.mean @ weights
        return Classifier(torch.cat([weights, bias]), iterations, converged)

    def _minimize(self, solution: Tensor, weight: float, most: int) -> tuple[Tensor, int]:
        """Return a better solution, and the number of iterations: fewer than ``most`` if it is the best."""
        scale = self._curvature(solution, weight).rsqrt()
        point = (solution / scale).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [point], max_iter=most, max_eval=2 * most, tolerance_grad=TOLERANCE * min(1.0, weight),
            tolerance_change=0, history_size=HISTORY, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def objective() -> Tensor:
            loss, gradient = self._objective(point.detach() * scale, weight)
            point.grad = gradient * scale
            return loss

        optimizer.step(objective)
        return point.detach() * scale, optimizer.state[point]["n_iter"]

    def _objective(self, solution: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Return C times the summed cross entropy with the penalty, and its gradient [D + 1, K]."""
        gradient = solution.clone()
        gradient[-1] = 0  # the bias is not penalised
        loss = gradient.square().sum() / 2
        for x, classes in self._blocks():
            log_likely = (x @ solution).log_softmax(1)
            loss = loss - weight * log_likely.gather(1, classes[:, None]).sum()
            residual = log_likely.exp_()
            residual[torch.arange(len(x), device=x.device), classes] -= 1
            gradient += weight * (x.T @ residual)
        return loss, gradient

    def _curvature(self, solution: Tensor, weight: float) -> Tensor:
        """Return the diagonal of the Hessian [D + 1, K]."""
        curvature = torch.ones_like(solution)
        curvature[-1] = 1e-12  # more than nothing
        for x, _ in self._blocks():
            likely = (x @ solution).softmax(1)
            curvature += weight * (x.square().T @ (likely * (1 - likely)))
        return curvature

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = max(1, BLOCK // self.num_classes)
        return zip(self.inputs.split(rows), self.classes.split(rows), strict=True)


class ScikitLearnSolver:
    """scikit-learn's logistic regression by L-BFGS; arguments are those of :class:`TorchSolver`."""

    def __init__(self, train: Samples) -> None:
        self.mean = train.features.double().mean(0)  # the bias takes it up, and the solver gets further without it
        self.features, self.classes = (train.features - self.mean).numpy(), train.classes.numpy()

    def fit(self, C: float) -> Classifier:
        """Return the classifier for an inverse strength of the penalty."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=C, max_iter=MAX_ITERATIONS, tol=1e-12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # iterations say the same
            model.fit(self.features, self.classes)
        weights, bias = torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)
        weights = torch.cat([weights, (bias - self.mean @ weights)[None]])
        if weights.shape[1] == 1:  # two classes: the scores of the second, against 0
            weights = torch.cat([torch.zeros_like(weights), weights], 1)
        iterations = int(model.n_iter_.max())
        return Classifier(weights, iterations, iterations < MAX_ITERATIONS)


Solver = TorchSolver | ScikitLearnSolver


def chosen_solver(name: str, device: str | torch.device) -> str:
    """Return the solver that a value of ``--solver`` stands for.

    Raises:
        ValueError: it is scikit-learn, which is not installed.
    """
    is_installed = importlib.util.find_spec("sklearn") is not None
    if name == "scikit-learn" and not is_installed:
        raise ValueError("--solver scikit-learn needs it: pip install 'clipfast[probe]', or use --solver torch")
    if name == "auto":
        return "scikit-learn" if is_installed and torch.device(device).type == "cpu" else "torch"
    return name


class Choice(NamedTuple):
    """A value of C, and the share of the validation set that is right with each value that was tried."""

    C: float
    tried: dict[float, float]


def choose(right: Callable[[float], float]) -> Choice:
    """Search the value of C with the largest share of right classes, as the paper does.

    It starts with one value every two decades, and halves the interval around the best until it is an eighth of a
    decade. Of equal shares that of the strongest penalty is the best.

    Args:
        right: the share for a value of C.
    """
    tried: dict[int, float] = {}

    def best_of(steps: Iterable[int]) -> int:
        for step in steps:
            if step not in tried:
                tried[step] = right(VALUES[step])
        return max(sorted(steps), key=tried.__getitem__)

    size = FIRST_STEP
    best = best_of(range(0, len(VALUES), size))
    while size > 1:
        size //= 2
        best = best_of([step for step in (best - size, best, best + size) if 0 <= step < len(VALUES)])
    return Choice(VALUES[best], {VALUES[step]: tried[step] for step in sorted(tried)})


@dataclasses.dataclass
class Probe:
    """Fits classifiers, each with a value of C of its own.

    Attributes:
        solver: makes a solver for a training set.
        classnames: of the training set.
        validation: chooses C; None for a given one.
        C: the given one.
    """

    solver: Callable[[Samples], Solver]
    classnames: Sequence[str]
    validation: Samples | None
    C: float = 1.0

    def fit(self, train: Samples, *, then_all: bool = False) -> tuple[Classifier, Choice]:
        """Return the classifier of a training set, and how its C was chosen.

        Args:
            train: the training set, without what chooses C.
            then_all: with the chosen value, fit the classifier to both.
        """
        solver = self.solver(train)
        validation = self.validation
        if validation is None:
            return solver.fit(self.C), Choice(self.C, {})
        choice = choose(lambda C: self._right(solver.fit(C), validation))
        solver = self.solver(train.and_those_of(validation)) if then_all else solver
        return solver.fit(choice.C), choice

    def _right(self, classifier: Classifier, samples: Samples) -> float:
        return classifier.classify(samples, self.classnames).right.double().mean().item()


def make_solver(name: str, device: str | torch.device, train: Samples) -> Solver:
    """Return the solver "scikit-learn" or "torch" for a training set."""
    return ScikitLearnSolver(train) if name == "scikit-learn" else TorchSolver(train, device)


def fit_probe(
    samples: dict[str, Samples], classnames: Sequence[str], solver: str, device: str | torch.device, seed: int,
    C: float | None = None,
) -> tuple[Probe, Samples, Classifier, Choice]:  # fmt: skip
    """Return what fits classifiers, the training set without what chooses C, the classifier, and how C was chosen.

    Args:
        samples: "train", and "val", which chooses C; without it a part of the training set does.
        classnames: of the training set.
        solver, device: as :func:`make_solver` takes them.
        seed: of the part.
        C: a given value, for which nothing is held out.

    Raises:
        ValueError: no part can be held out.
    """
    train, validation = samples["train"], samples.get("val")
    if C is None and validation is None:
        train, validation = split(train, seed)
    probe = Probe(functools.partial(make_solver, solver, device), classnames, validation, C or 1.0)
    return probe, train, *probe.fit(train, then_all=True)


def draw(train: Samples, shots: int, seed: int) -> Samples:
    """Return ``shots`` images of each class, or all that it has; a draw of more shots holds those of fewer."""
    return train.take(torch.cat([members[:shots] for members in members_of_classes(train, seed)]))


def curve(
    probe: Probe, train: Samples, test: Samples, shots: Iterable[int], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Return mean and standard deviation of the figures for each number of shots, and those of each draw.

    Args:
        probe: fits the classifiers.
        train: what images are drawn from.
        test: what the classifiers are judged on.
        shots: numbers of images per class.
        seeds: of the draws.
    """
    draws: dict[int, list[dict[str, Any]]] = {}
    for count, seed in each([(count, seed) for count in shots for seed in seeds], "few-shot", "draws"):
        drawn = draw(train, count, seed)
        classifier, choice = probe.fit(drawn)
        about = {"seed": seed, "images": len(drawn.classes), "C": choice.C, "converged": classifier.converged}
        figures = metrics(classifier.classify(test, probe.classnames))
        draws.setdefault(count, []).append(about | figures)
    rows = []
    for count, found in draws.items():
        summary: dict[str, Any] = {}
        for name in ("acc1", "acc5", "mean_per_class_recall"):
            values = [one[name] for one in found if one[name] is not None]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            summary[name] = {"mean": statistics.fmean(values), "std": deviation} if values else None
        rows.append({"fewshot_k": count, **summary, "draws": found})
    return rows
