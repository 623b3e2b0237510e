"""Logistic regression with an L2 penalty: by scikit-learn, and its objective minimised in PyTorch, on any device.

Over a training set of N samples, both minimise

    mean of cross_entropy(x @ weights + bias)  +  |weights|^2 / (2 * C * N)

With two classes scikit-learn has one column of weights. The same as two columns, w / 2 and -w / 2, it has half the
norm, so that the penalty is twice as large.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..classification import Classified, classify

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


class Solver(Protocol):
    """Fits classifiers to one training set."""

    def fit(self, C: float) -> Classifier:
        """Return the classifier for an inverse strength of the penalty."""


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


def make_solver(name: str, train: Samples, device: str | torch.device) -> Solver:
    """Return the solver "scikit-learn" or "torch" for a training set."""
    return ScikitLearnSolver(train) if name == "scikit-learn" else TorchSolver(train, device)
