"""Linear probes: equal to scikit-learn's, exact at the minimum, converged or warned about, and refused inputs."""

import json

import pytest
import torch

from clipfast.evaluate import probe_fit
from clipfast.evaluate.probe_fit import (
    VALUES,
    Probe,
    Samples,
    ScikitLearnSolver,
    TorchSolver,
    choose,
    chosen_solver,
    curve,
    draw,
    split,
)

from ..small_runs import picture, write_shard
from .eval_commands import check_refused, printed, save_model, wrong_inputs
from .eval_commands import split as words_of

NAMES = [f"class {number}" for number in range(20)]


def drawn(count, width, classes, *, signal=0.7, seed=0, missing=None):
    """Draw features of a training and a test set for a linear probe, with a common mean, as image encoders have it."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator)

    def some(number):
        """Draw the features and classes of ``number`` samples for a linear probe."""
        labels = torch.cat([torch.arange(classes), torch.randint(classes, (number - classes,), generator=generator)])
        x = signal * centres[labels] + 2 * torch.randn(number, width, generator=generator) + 3
        return Samples(torch.nn.functional.normalize(x, dim=1), labels)

    train, test = some(count), some(800)
    return train, test if missing is None else test.take(test.classes != missing)


def by_scikit_learn(train, test, C):
    """Fit a linear probe by scikit-learn's LogisticRegression, and return the predicted classes of the test set."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.LogisticRegression(C=C, max_iter=10_000, tol=1e-12)
    model.fit(train.features.double().numpy(), train.classes.numpy())
    return torch.from_numpy(model.predict(test.features.double().numpy()))


CASES = {
    "two classes": {"count": 301, "width": 17, "classes": 2, "signal": 0.3, "C": 0.01},
    "more features than samples": {"count": 29, "width": 96, "classes": 5, "C": 1e4},
    "one sample per class": {"count": 6, "width": 40, "classes": 6, "C": 1.0},
    "a class that the test set lacks": {"count": 200, "width": 20, "classes": 6, "missing": 2, "C": 1e4},
    "labels without a relation to features": {"count": 400, "width": 24, "classes": 4, "signal": 0.0, "C": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_every_prediction_is_that_of_scikit_learn(case):
    given = dict(CASES[case])
    C = given.pop("C")
    train, test = drawn(**given)
    expected = by_scikit_learn(train, test, C)
    for solver in TorchSolver(train), ScikitLearnSolver(train):
        found = solver.fit(C).classify(test, NAMES[: given["classes"]])
        assert torch.equal(found.best[:, 0], expected), type(solver)


def test_the_gradient_vanishes_at_the_solution():
    """The gradient of the probe's objective (see probe_fit.py), computed by autograd, vanishes at the solution."""
    train, _ = drawn(150, 20, 5)
    x = train.features.double()
    for C in (1e-6, 1e4):
        found = TorchSolver(train).fit(C).weights
        gradients = []
        for weights in (torch.zeros_like(found).requires_grad_(), found.requires_grad_()):
            scores = x @ weights[:-1] + weights[-1]
            value = C * torch.nn.functional.cross_entropy(scores, train.classes, reduction="sum")
            gradients += torch.autograd.grad(value + weights[:-1].square().sum() / 2, weights)
        first, last = (gradient.abs().max() for gradient in gradients)
        assert last < 1e-5 * first


def test_blocks_change_nothing(monkeypatch):
    train, _ = drawn(150, 20, 5)
    whole = TorchSolver(train).fit(10.0)
    monkeypatch.setattr(probe_fit, "BLOCK", 35)  # the solver computes in blocks of 7 rows
    torch.testing.assert_close(TorchSolver(train).fit(10.0).weights, whole.weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [TorchSolver, ScikitLearnSolver])
def test_too_few_iterations_are_said(make, monkeypatch):
    solver = make(drawn(150, 20, 5)[0])
    assert solver.fit(100.0).converged
    monkeypatch.setattr(probe_fit, "MAX_ITERATIONS", 5)
    assert solver.fit(100.0)[1:] == (5, False)


def test_the_search_finds_a_peak_with_few_fits():
    for peak in (0, 1, 7, 40, 48, 95, 96):
        choice = choose(lambda C, peak=peak: -abs(VALUES.index(C) - peak))
        assert VALUES[peak] == choice.C
        assert len(choice.tried) <= 15
    # Among values of C with equal accuracies, the smallest is chosen, which has the strongest penalty.
    assert VALUES[0] == choose(lambda C: 0.5).C


def test_the_split_takes_a_fifth_of_each_class_and_leaves_one_image():
    classes = torch.tensor([0] * 10 + [1] * 2 + [2] + [3] * 4)
    samples = Samples(torch.arange(17.0)[:, None], classes)
    train, validation = split(samples, 0)
    assert torch.bincount(train.classes).tolist() == [8, 1, 1, 3]
    both = train.and_those_of(validation)
    assert sorted(zip(both.features[:, 0].tolist(), both.classes.tolist(), strict=True)) == [*enumerate(classes)]
    with pytest.raises(ValueError, match=r"no class has two training images.*: give --val-data or --C"):
        split(samples.take(torch.tensor([0, 10, 12])), 0)


def test_draws_are_nested_and_differ_by_seed():
    train, test = drawn(300, 12, 4)
    few, more = draw(train, 3, 0), draw(train, 9, 0)
    assert [torch.bincount(one.classes).tolist() for one in (few, more)] == [[3] * 4, [9] * 4]
    assert {tuple(row) for row in few.features.tolist()} < {tuple(row) for row in more.features.tolist()}
    assert not torch.equal(draw(train, 3, 1).features, few.features)
    most = torch.bincount(train.classes).max().item()
    few, all_there_are = curve(Probe(TorchSolver, NAMES[:4], None), train, test, [1, most], range(3))
    assert few["acc1"]["std"] > 1e-9 > all_there_are["acc1"]["std"]
    assert few["acc5"] is None
    assert few["acc1"]["mean"] < all_there_are["acc1"]["mean"]


def test_solvers_are_chosen_by_device_and_what_is_installed(monkeypatch):
    pytest.importorskip("sklearn")
    assert [chosen_solver("auto", device) for device in ("cpu", "cuda")] == ["scikit-learn", "torch"]
    assert chosen_solver("scikit-learn", "cuda") == "scikit-learn"
    monkeypatch.setattr(probe_fit.importlib.util, "find_spec", lambda _: None)
    assert chosen_solver("auto", "cpu") == "torch"
    with pytest.raises(ValueError, match=r"pip install 'clipfast\[probe\]', or use --solver torch"):
        chosen_solver("scikit-learn", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write images of three classes for a linear probe, as a training and a test set, and a set of one class."""
    folder = tmp_path_factory.mktemp("probe")
    for name, start, count, labels in (("train", 0, 30, "abc"), ("test", 100, 18, "abc"), ("one", 0, 6, "aaa")):
        texts = [json.dumps({"label": labels[index % 3], "other": f"only {name}"}) for index in range(count)]
        samples = [
            {"png": picture(start + index % 3 + 7 * (index // 3)), "txt": b"x", "json": text.encode()}
            for index, text in enumerate(texts)
        ]
        write_shard(folder / f"{name}.tar", samples)
    save_model(folder / "w.pt")
    return folder


GIVEN = (
    "probe --model ViT-T-8-32 --pretrained {at}/w.pt --train-data {at}/train.tar --data {at}/test.tar --label-by label "
    "--solver torch "
)


def command(folder, words, *more):
    """Return the arguments of ``clipfast eval probe`` for the sets in a folder."""
    return [*words_of(GIVEN + words, at=folder), *more]


@pytest.mark.long
def test_the_command_writes_what_clip_benchmark_would(folder, capsys, tmp_path):
    kept = ("--features", tmp_path / "features")
    outputs = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    out, err = printed(capsys, *command(folder, "--shots 20 1 --seeds 1", *kept, *outputs))
    results = json.loads(out)
    assert results == json.loads((tmp_path / "out.json").read_text())
    assert (results["task"], results["dataset"]) == ("linear_probe", f"{folder}/test.tar")
    metrics = results["metrics"]
    assert " ".join(metrics) == "lp_acc1 lp_acc5 lp_mean_per_class_recall C seed fewshot_k normalized"
    assert results["images"] == {"train": 24, "validation": 6, "test": 18}
    assert [row["fewshot_k"] for row in results["few_shot"]] == [1, 20]
    assert "3 classes have fewer images: a (8), b (8), c (8)" in err
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    # The feature store keeps normalized and unnormalized features apart.
    more = ("--table", "--json", tmp_path / "raw.json")
    table, _ = printed(capsys, *command(folder, "--C 1 --unnormalized", *kept, *more))
    assert "30 training, 0 validation and 18 test images" in table
    assert metrics["normalized"] != json.loads((tmp_path / "raw.json").read_text())["metrics"]["normalized"]
    assert len(list(tmp_path.glob("features/images/*"))) == 4


WRONG = {
    "--train-data {at}/one.tar": "has one class only, 'a'",
    "--label-by other --train-data {at}/train.tar::{at}/one.tar": "'only test' (18 images)",
    "--C 0": "--C must be more than 0, and finite, got 0",
    "--C nan": "--C must be more than 0, and finite, got nan",
    "--C 1 --val-data {at}/test.tar": "give one of --C and --val-data",
    "--plot {tmp}/x.png": "--plot draws accuracy over --shots: give some",
    "--shots 1 --classnames imagenet": "1000 class names for 3 classes",
}


@wrong_inputs(WRONG)
def test_wrong_inputs(words, message, folder, capsys, tmp_path):
    check_refused(capsys, tmp_path, message, *command(folder, ""), words=words, at=folder)
