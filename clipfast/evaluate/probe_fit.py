"""Linear probes on image features: logistic regression with an L2 penalty, by scikit-learn or PyTorch.

Over a training set of N samples, both solvers minimise

    mean of cross_entropy(x @ weights + bias)  +  |weights|^2 / (2 * C * N)

With two classes scikit-learn has one column of weights, w. The equivalent columns w / 2 and -w / 2 have half its
squared norm, and so scikit-learn's penalty is twice as large. C is searched as in Radford et al. 2021, appendix A.3.
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

# The values of C among which the search chooses: from 1e-6 to 1e6, with 8 steps per decade.
VALUES = tuple(10.0 ** (step / 8 - 6) for step in range(97))
FIRST_STEP = 16  # the search starts with every 16th value, so two decades apart
VALIDATION_SHARE = 0.2  # the share of the training set that is held out if there is no validation set
MAX_ITERATIONS = 1000
TOLERANCE = 1e-6  # TorchSolver stops when all gradients are below this times min(1, C), as weights are of that size
FIRST = 100  # TorchSolver rescales its weights after this many iterations, then after twice as many, and so on
HISTORY = 10  # the number of past steps from which L-BFGS approximates the Hessian (``history_size``)
BLOCK = 2**24  # the number of scores in memory at a time


class Samples(NamedTuple):
    """The images of a linear probe's training, validation or test set: features [N, D] and classes [N], on the CPU."""

    features: Tensor
    classes: Tensor

    def take(self, numbers: Tensor) -> Samples:
        """Return a linear probe's samples at the positions ``numbers``."""
        return Samples(self.features[numbers], self.classes[numbers])

    def and_those_of(self, others: Samples) -> Samples:
        """Return a linear probe's samples followed by those of another set."""
        return Samples(*(torch.cat(pair) for pair in zip(self, others, strict=True)))


class Classifier(NamedTuple):
    """A linear classifier (linear probe) on features.

    Attributes:
        weights: float64 [D + 1, K], of which the last row is the bias.
        iterations: the number of iterations of the solver.
        converged: False if the solver stopped at its limit of iterations.
    """

    weights: Tensor
    iterations: int
    converged: bool

    def classify(self, samples: Samples, classnames: Sequence[str]) -> Classified:
        """Return the predictions of this linear probe for samples; ``classnames`` are the labels by class index."""
        x = samples.features.to(self.weights)
        labels = [classnames[number] for number in samples.classes.tolist()]
        return classify(torch.cat([x, x.new_ones(len(x), 1)], 1), labels, classnames, self.weights)


def samples_of(found: LabelledFeatures, classnames: Sequence[str], name: str) -> Samples:
    """Return the features and class indices of an image set, for a linear probe.

    Args:
        found: the features and labels of the set.
        classnames: the labels of the training set.
        name: the name of the set, for error messages.

    Raises:
        ValueError: a label does not occur in the training set, or a feature is not finite.
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
    """Split a probe's training set: a fifth of each class, or at least one of two images, becomes the validation set.

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
    """Return the positions of the images of each class in random order, for a seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.classes), generator=generator)
    by_class = order[train.classes[order].argsort(stable=True)]
    return list(by_class.split(torch.bincount(train.classes).tolist()))


class TorchSolver:
    """Fits a linear probe by L-BFGS in coordinates in which the objective has similar curvature in all directions.

    The features of an image encoder have a large mean and vary mostly in a few directions, for which plain L-BFGS needs
    many more iterations. Therefore the mean is subtracted, and features are rotated to their principal directions. This
    does not change the optimum, since the bias absorbs the mean, and a rotation keeps the norm of the weights. From
    time to time each weight is scaled by the curvature in its direction.

    Args:
        train: the training set, with at least one sample of each class.
        device: the device to which the training set is moved.
    """

    def __init__(self, train: Samples, device: str | torch.device = "cpu") -> None:
        x = train.features.to(device, torch.float64)
        self.classes = train.classes.to(device)
        self.num_classes = int(train.classes.max()) + 1
        self.mean = x.mean(0)
        x = x - self.mean
        self.directions = torch.linalg.eigh(x.T @ x).eigenvectors
        # [N, D + 1]: the rotated features, and a column of ones for the bias.
        self.inputs = torch.cat([x @ self.directions, x.new_ones(len(x), 1)], 1)

    def fit(self, C: float) -> Classifier:
        """Fit the linear probe with the inverse penalty strength ``C``."""
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
        """Fit the linear probe by L-BFGS, starting at ``solution`` [D + 1, K].

        Return the new solution and the number of iterations. If it is less than ``most``, L-BFGS has converged.
        """
        scale = self._curvature(solution, weight).rsqrt()
        point = (solution / scale).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [point], max_iter=most, max_eval=2 * most, tolerance_grad=TOLERANCE * min(1.0, weight),
            tolerance_change=0, history_size=HISTORY, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def objective() -> Tensor:
            """Return the probe's objective at ``point``, and set ``point.grad``, as L-BFGS requires."""
            loss, gradient = self._objective(point.detach() * scale, weight)
            point.grad = gradient * scale
            return loss

        optimizer.step(objective)
        return point.detach() * scale, optimizer.state[point]["n_iter"]

    def _objective(self, solution: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Return the probe's objective (C times the summed cross entropy, plus the penalty) and gradient [D + 1, K]."""
        gradient = solution.clone()
        gradient[-1] = 0  # the penalty does not include the bias
        loss = gradient.square().sum() / 2
        for x, classes in self._blocks():
            log_likely = (x @ solution).log_softmax(1)
            loss = loss - weight * log_likely.gather(1, classes[:, None]).sum()
            residual = log_likely.exp_()
            residual[torch.arange(len(x), device=x.device), classes] -= 1
            gradient += weight * (x.T @ residual)
        return loss, gradient

    def _curvature(self, solution: Tensor, weight: float) -> Tensor:
        """Return the diagonal of the Hessian of the probe's objective, [D + 1, K]."""
        curvature = torch.ones_like(solution)
        curvature[-1] = 1e-12  # the bias has no penalty; not 0, since the reciprocal is taken
        for x, _ in self._blocks():
            likely = (x @ solution).softmax(1)
            curvature += weight * (x.square().T @ (likely * (1 - likely)))
        return curvature

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``inputs`` and ``classes`` of the linear probe in blocks of rows whose scores fit into memory."""
        rows = max(1, BLOCK // self.num_classes)
        return zip(self.inputs.split(rows), self.classes.split(rows), strict=True)


class ScikitLearnSolver:
    """Fits a linear probe to the training set ``train`` by scikit-learn's logistic regression (L-BFGS), on the CPU."""

    def __init__(self, train: Samples) -> None:
        # Without the mean of the features, which the bias absorbs afterwards, the solver converges faster.
        self.mean = train.features.double().mean(0)
        self.features, self.classes = (train.features - self.mean).numpy(), train.classes.numpy()

    def fit(self, C: float) -> Classifier:
        """Fit the linear probe with the inverse penalty strength ``C``."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=C, max_iter=MAX_ITERATIONS, tol=1e-12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # since ``Classifier.converged`` says the same
            model.fit(self.features, self.classes)
        weights, bias = torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)
        weights = torch.cat([weights, (bias - self.mean @ weights)[None]])
        if weights.shape[1] == 1:  # for two classes, scikit-learn has only the score of the second minus the first
            weights = torch.cat([torch.zeros_like(weights), weights], 1)
        iterations = int(model.n_iter_.max())
        return Classifier(weights, iterations, iterations < MAX_ITERATIONS)


Solver = TorchSolver | ScikitLearnSolver


def chosen_solver(name: str, device: str | torch.device) -> str:
    """Return "scikit-learn" or "torch" for a probe's ``--solver``; "auto" is scikit-learn on a CPU if it is installed.

    Raises:
        ValueError: scikit-learn is wanted and not installed.
    """
    is_installed = importlib.util.find_spec("sklearn") is not None
    if name == "scikit-learn" and not is_installed:
        raise ValueError("--solver scikit-learn needs it: pip install 'clipfast[probe]', or use --solver torch")
    if name == "auto":
        return "scikit-learn" if is_installed and torch.device(device).type == "cpu" else "torch"
    return name


class Choice(NamedTuple):
    """The chosen value of C, and the validation accuracy with each value that was tried."""

    C: float
    tried: dict[float, float]


def choose(right: Callable[[float], float]) -> Choice:
    """Search the C of a linear probe with the highest validation accuracy, as Radford et al. 2021 do.

    The search starts with values two decades apart, and halves the interval around the best one until it is an eighth
    of a decade. Of equal accuracies, the one with the strongest penalty is the best.

    Args:
        right: returns the validation accuracy for a value of C.
    """
    tried: dict[int, float] = {}

    def best_of(steps: Iterable[int]) -> int:
        """Fit a linear probe with each value of C whose index is in ``steps``, and return the best index."""
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
    """Fits linear probes to training sets; C is searched for each of them, unless it is given.

    Attributes:
        solver: a function that makes a solver for a training set.
        classnames: the labels of the training set.
        validation: the set whose accuracy chooses C; None if C is given.
        C: the value of C without a search; it is not used if there is a validation set.
    """

    solver: Callable[[Samples], Solver]
    classnames: Sequence[str]
    validation: Samples | None
    C: float = 1.0

    def fit(self, train: Samples, *, then_all: bool = False) -> tuple[Classifier, Choice]:
        """Fit a linear probe to a training set, and return it with the choice of its C.

        Args:
            train: the training set, without the validation set.
            then_all: fit the returned classifier, with the chosen C, to the training and validation set together.
        """
        solver = self.solver(train)
        validation = self.validation
        if validation is None:
            return solver.fit(self.C), Choice(self.C, {})
        choice = choose(lambda C: self._right(solver.fit(C), validation))
        solver = self.solver(train.and_those_of(validation)) if then_all else solver
        return solver.fit(choice.C), choice

    def _right(self, classifier: Classifier, samples: Samples) -> float:
        """Return the accuracy of a linear probe on samples."""
        return classifier.classify(samples, self.classnames).right.double().mean().item()


def make_solver(name: str, device: str | torch.device, train: Samples) -> Solver:
    """Make the probe's solver "scikit-learn" or "torch" for a training set."""
    return ScikitLearnSolver(train) if name == "scikit-learn" else TorchSolver(train, device)


def fit_probe(
    samples: dict[str, Samples], classnames: Sequence[str], solver: str, device: str | torch.device, seed: int,
    C: float | None = None,
) -> tuple[Probe, Samples, Classifier, Choice]:  # fmt: skip
    """Fit a linear probe; return the :class:`Probe`, the training set without validation, the classifier, and its C.

    Args:
        samples: the sets "train" and perhaps "val", which chooses C; without "val", a part of "train" is held out to
            choose C.
        classnames: the labels of the training set.
        solver, device: as :func:`make_solver` takes them.
        seed: the seed of the part that is held out.
        C: a given value, for which nothing is held out.

    Raises:
        ValueError: no part of the training set can be held out.
    """
    train, validation = samples["train"], samples.get("val")
    if C is None and validation is None:
        train, validation = split(train, seed)
    probe = Probe(functools.partial(make_solver, solver, device), classnames, validation, C or 1.0)
    return probe, train, *probe.fit(train, then_all=True)


def draw(train: Samples, shots: int, seed: int) -> Samples:
    """Draw ``shots`` training images of each class, or all images of a class that has fewer.

    With the same seed, the images of fewer shots are among those of more.
    """
    return train.take(torch.cat([members[:shots] for members in members_of_classes(train, seed)]))


def curve(
    probe: Probe, train: Samples, test: Samples, shots: Iterable[int], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the probe's few-shot metrics: mean and standard deviation for each number of shots, and each draw's own.

    Args:
        probe: fits the classifiers.
        train: the set from which images are drawn.
        test: the set on which the classifiers are evaluated.
        shots: the numbers of images per class.
        seeds: the seeds of the draws.
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
