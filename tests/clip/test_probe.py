"""Linear probes: equal to scikit-learn's, right where they must be, and clear about what cannot work."""

import json
import os
import subprocess
import sys

import pytest
import torch

from clipfast.evaluation.classification import metrics
from clipfast.evaluation.features import LabelledFeatures
from clipfast.evaluation.tasks import probe_solver
from clipfast.evaluation.tasks.probe_fit import VALUES, Probe, choose, samples_of, split
from clipfast.evaluation.tasks.probe_shots import curve, draw, lacking
from clipfast.evaluation.tasks.probe_solver import Samples, ScikitLearnSolver, TorchSolver, chosen_solver

from .conftest import picture, run_command, write_shard

NAMES = [f"class {number}" for number in range(20)]


def drawn(count, width, classes, *, signal=0.7, seed=0, missing=None):
    """Features of unit length with a common mean, as an image encoder's are; training and test set."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator)

    def some(number):
        labels = torch.cat([torch.arange(classes), torch.randint(classes, (number - classes,), generator=generator)])
        x = signal * centres[labels] + 2 * torch.randn(number, width, generator=generator) + 3
        return Samples(torch.nn.functional.normalize(x, dim=1), labels)

    train, test = some(count), some(800)
    return train, test if missing is None else test.take(test.classes != missing)


def by_scikit_learn(train, test, C):
    """What a user of scikit-learn would write."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.LogisticRegression(C=C, max_iter=10_000, tol=1e-12)
    model.fit(train.features.double().numpy(), train.classes.numpy())
    return torch.from_numpy(model.predict(test.features.double().numpy()))


CASES = {
    "more samples than features": {"count": 500, "width": 33, "classes": 7},
    "two classes": {"count": 301, "width": 17, "classes": 2, "signal": 0.3},
    "more features than samples": {"count": 29, "width": 96, "classes": 5},
    "one sample per class": {"count": 6, "width": 40, "classes": 6},
    "a class that the test set lacks": {"count": 200, "width": 20, "classes": 6, "missing": 2},
    "labels without a relation to features": {"count": 400, "width": 24, "classes": 4, "signal": 0.0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("C", [0.01, 1.0, 1e4])
def test_every_prediction_is_that_of_scikit_learn(case, C):
    train, test = drawn(**case)
    expected = by_scikit_learn(train, test, C)
    for solver in TorchSolver(train), ScikitLearnSolver(train):
        found = solver.fit(C).classify(test, NAMES[: case["classes"]])
        assert torch.equal(found.best[:, 0], expected), type(solver)


def test_duplicated_rows_weigh_twice():
    train, test = drawn(60, 20, 5)
    twice = train.and_those_of(train)
    assert torch.equal(
        TorchSolver(twice).fit(3.0).classify(test, NAMES[:5]).best[:, 0], by_scikit_learn(twice, test, 3)
    )
    once, of_twice = TorchSolver(train).fit(6.0), TorchSolver(twice).fit(3.0)
    torch.testing.assert_close(once.weights[:-1], of_twice.weights[:-1], rtol=0, atol=1e-4)


def test_the_gradient_vanishes_at_the_solution():
    """Found with automatic differentiation, of the formula in the module's first lines."""
    train, _ = drawn(150, 20, 5)
    x = train.features.double()
    for C in (1e-6, 1.0, 1e6):
        found = TorchSolver(train).fit(C).weights
        gradients = []
        for weights in (torch.zeros_like(found).requires_grad_(), found.requires_grad_()):
            scores = x @ weights[:-1] + weights[-1]
            value = C * torch.nn.functional.cross_entropy(scores, train.classes, reduction="sum")
            gradients += torch.autograd.grad(value + weights[:-1].square().sum() / 2, weights)
        first, last = (gradient.abs().max() for gradient in gradients)
        assert last < 1e-5 * first


def test_blocks_change_nothing(monkeypatch):
    train, test = drawn(150, 20, 5)
    whole = TorchSolver(train).fit(10.0)
    monkeypatch.setattr(probe_solver, "BLOCK", 35)  # 7 rows
    torch.testing.assert_close(TorchSolver(train).fit(10.0).weights, whole.weights, rtol=0, atol=1e-6)
    assert len(list(TorchSolver(train)._blocks())) == 22
    assert metrics(whole.classify(test, NAMES[:5]))["acc1"] > 0.4


@pytest.mark.parametrize("make", [TorchSolver, ScikitLearnSolver])
def test_too_few_iterations_are_said(make, monkeypatch):
    train, _ = drawn(150, 20, 5)
    assert make(train).fit(100.0).converged
    monkeypatch.setattr(probe_solver, "MAX_ITERATIONS", 5)
    found = make(train).fit(100.0)
    assert (found.converged, found.iterations) == (False, 5)


def test_separable_classes_are_all_right_and_random_labels_are_chance():
    labels = torch.arange(400) % 8
    noise = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    separable = Samples(torch.eye(16)[labels] + 0.05 * noise, labels)
    train, validation = split(separable, 0)
    probe = Probe(TorchSolver, NAMES[:8], validation)
    classifier, choice = probe.fit(train)
    assert set(metrics(classifier.classify(separable, NAMES[:8])).values()) == {1.0}
    assert choice.tried[choice.C] == 1.0
    random = Samples(noise, labels[torch.randperm(400, generator=torch.Generator().manual_seed(1))])
    train, rest = random.take(torch.arange(200)), random.take(torch.arange(200, 400))
    found = metrics(Probe(TorchSolver, NAMES[:8], None).fit(train)[0].classify(rest, NAMES[:8]))
    assert 0.05 < found["acc1"] < 0.22  # 1/8
    assert 0.5 < found["acc5"] < 0.75  # 5/8


@pytest.mark.parametrize("peak", [0, 1, 7, 40, 48, 95, 96])
def test_the_search_finds_a_peak_with_few_fits(peak):
    choice = choose(lambda C: -abs(VALUES.index(C) - peak))
    assert VALUES[peak] == choice.C
    assert len(choice.tried) <= 15
    assert (VALUES[0], VALUES[96], len(VALUES)) == (pytest.approx(1e-6), pytest.approx(1e6), 97)


def test_of_equal_shares_the_strongest_penalty_is_chosen():
    assert VALUES[0] == choose(lambda C: 0.5).C
    assert pytest.approx(1.0) == choose(lambda C: float(C >= 0.999)).C


def test_the_split_takes_a_fifth_of_each_class_and_leaves_one_image():
    classes = torch.tensor([0] * 10 + [1] * 2 + [2] + [3] * 4)
    samples = Samples(torch.arange(17.0)[:, None], classes)
    train, validation = split(samples, 0)
    assert torch.bincount(train.classes).tolist() == [8, 1, 1, 3]
    assert torch.bincount(validation.classes, minlength=4).tolist() == [2, 1, 0, 1]
    both = train.and_those_of(validation)
    assert sorted(both.features[:, 0].tolist()) == list(range(17))
    assert torch.equal(classes[both.features[:, 0].long()], both.classes)
    assert torch.equal(split(samples, 0)[1].features, validation.features)
    assert not torch.equal(split(samples, 1)[1].features, validation.features)
    with pytest.raises(ValueError, match=r"no class has two training images.*: give --val-data or --C"):
        split(samples.take(torch.tensor([0, 10, 12])), 0)


def test_the_last_fit_uses_the_validation_set_too():
    train, test = drawn(100, 12, 4)
    validation = test.take(torch.arange(100))
    sizes = []

    def solver(samples):
        sizes.append(len(samples.classes))
        return TorchSolver(samples)

    Probe(solver, NAMES[:4], validation).fit(train, then_all=True)
    assert sizes == [100, 200]
    Probe(solver, NAMES[:4], validation).fit(train)
    assert sizes[2:] == [100]


def test_draws_are_nested_and_differ_by_seed():
    train, test = drawn(300, 12, 4)
    few, more = draw(train, 3, 0), draw(train, 9, 0)
    assert torch.bincount(few.classes).tolist() == [3] * 4
    assert torch.bincount(more.classes).tolist() == [9] * 4
    assert {tuple(row) for row in few.features.tolist()} < {tuple(row) for row in more.features.tolist()}
    assert not torch.equal(draw(train, 3, 1).features, few.features)
    assert lacking(train, NAMES[:4], 20) is None
    most = torch.bincount(train.classes).max().item()
    found = curve(Probe(TorchSolver, NAMES[:4], None), train, test, [1, most], range(3), lambda draws: draws)
    assert [len(row["draws"]) for row in found] == [3, 3]
    assert found[0]["acc1"]["std"] > 0
    assert found[0]["acc5"] is None
    assert found[1]["acc1"]["mean"] > found[0]["acc1"]["mean"]
    assert found[1]["acc1"]["std"] < 1e-9  # all images in each draw


def test_classes_with_fewer_images_than_shots_are_named():
    train = Samples(torch.arange(8.0)[:, None], torch.tensor([0] * 5 + [1, 1, 2]))
    assert torch.bincount(draw(train, 3, 0).classes).tolist() == [3, 2, 1]
    expected = "3 shots: all that they have is used of 2 classes with fewer training images: b (2), c (1)"
    assert lacking(train, ["a", "b", "c"], 3) == expected


def test_solvers_are_chosen_by_device_and_what_is_installed(monkeypatch):
    pytest.importorskip("sklearn")
    assert [chosen_solver("auto", device) for device in ("cpu", "cuda")] == ["scikit-learn", "torch"]
    assert chosen_solver("scikit-learn", "cuda") == "scikit-learn"
    monkeypatch.setattr(probe_solver.importlib.util, "find_spec", lambda _: None)
    assert chosen_solver("auto", "cpu") == "torch"
    with pytest.raises(ValueError, match=r"pip install 'clipfast\[probe\]', or use --solver torch"):
        chosen_solver("scikit-learn", "cpu")


def test_sets_with_other_labels_or_broken_features_are_refused():
    found = LabelledFeatures(torch.ones(3, 2), ["a", "x", "x"], [("a",)] * 3, [""] * 3)
    with pytest.raises(ValueError, match=r"test has 1 labels that the training set lacks, such as 'x' \(2 images\)"):
        samples_of(found, ["a", "b"], "test")
    found.features[1, 1] = float("nan")
    with pytest.raises(ValueError, match="features of test contain NaN or infinity"):
        samples_of(found, ["a", "x"], "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three brightnesses, as a training and a test set."""
    folder = tmp_path_factory.mktemp("probe")
    for name, start, count in (("train", 0, 30), ("test", 100, 18), ("one", 0, 6)):
        samples = []
        for index in range(count):
            label = "abc"[index % 3] if name != "one" else "a"
            text = json.dumps({"label": label, "other": f"only {name}"}).encode()
            samples.append({"png": picture(start + index % 3 + 7 * (index // 3)), "txt": b"x", "json": text})
        write_shard(folder / f"{name}.tar", samples)
    torch.manual_seed(0)
    from clipfast import create_model

    torch.save({"state_dict": create_model("ViT-T-8-32").state_dict()}, folder / "model.pt")
    return folder


def arguments(folder, **changes):
    given = {
        "--model": "ViT-T-8-32", "--pretrained": folder / "model.pt", "--train-data": folder / "train.tar",
        "--data": folder / "test.tar", "--label-by": "label", "--solver": "torch", **changes,
    }  # fmt: skip
    flat = [
        [flag, *(value if isinstance(value, list) else [value])] for flag, value in given.items() if value is not None
    ]
    return ["eval", "probe", *(str(word) for words in flat for word in words)]


@pytest.mark.long
def test_the_command_writes_what_clip_benchmark_would(folder, capsys, tmp_path):
    files = {"--json": tmp_path / "out.json", "--plot": tmp_path / "out.png", "--features": tmp_path / "features"}
    code, out, err = run_command(capsys, *arguments(folder, **files, **{"--shots": [4, 1, 20], "--seeds": 2}))
    assert code == 0, err
    results = json.loads(out)
    assert results == json.loads(files["--json"].read_text())
    assert (results["task"], results["dataset"]) == ("linear_probe", f"{folder}/test.tar")
    expected = {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "C", "seed", "fewshot_k", "normalized"}
    assert set(results["metrics"]) == expected
    low, high = results["intervals"]["lp_acc1"]
    assert low < results["metrics"]["lp_acc1"] <= high
    assert results["images"] == {"train": 24, "validation": 6, "test": 18}
    assert [row["fewshot_k"] for row in results["few_shot"]] == [1, 4, 20]
    assert "20 shots: all that they have is used of 3 classes with fewer training images: a (8), b (8), c (8)" in err
    assert f"C = {results['metrics']['C']:.4g}, with " in err
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")
    _, table, _ = run_command(capsys, *arguments(folder, **{"--features": files["--features"], "--C": 1}), "--table")
    assert "24 training" not in table
    assert table.startswith("linear probe: 30 training, 0 validation and 18 test images, 3 classes; C = 1\n")


def test_unnormalized_features_are_kept_apart(folder, capsys, tmp_path):
    both = [
        json.loads(run_command(capsys, *arguments(folder, **{"--features": tmp_path, "--C": 1}), *more)[1])["metrics"]
        for more in ([], ["--unnormalized"])
    ]
    assert [found["normalized"] for found in both] == [True, False]
    assert len(list(tmp_path.glob("images/*"))) == 4


WRONG = {
    "one class": ({"--train-data": "one.tar"}, "has one class only, 'a': name the right key by --label-by"),
    "unknown label": ({"--label-by": "other", "--train-data": "both"}, "'only test' (18 images)"),
    "no such key": ({"--label-by": "nothing"}, "not one of the 30 images"),
    "C of 0": ({"--C": 0}, "--C must be more than 0, and finite, got 0"),
    "infinite C": ({"--C": "inf"}, "--C must be more than 0, and finite, got inf"),
    "C is not a number": ({"--C": "nan"}, "--C must be more than 0, and finite, got nan"),
    "C and validation": ({"--C": 1, "--val-data": "test.tar"}, "give one of --C and --val-data"),
    "plot of nothing": ({"--plot": "x.png"}, "--plot draws accuracy over --shots: give some"),
    "plot nowhere": ({"--plot": "none/x.png", "--shots": 1}, "to write x.png in"),
    "plot of no format": ({"--plot": "x.txt", "--shots": 1}, "the name must end in one of"),
    "no such set": ({"--train-data": "none.tar"}, "none.tar"),
    "class names": ({"--shots": 1, "--classnames": "imagenet"}, "1000 class names for 3 classes"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_inputs(folder, capsys, tmp_path, changes, message):
    paths = {"--plot": tmp_path, "--train-data": folder, "--val-data": folder}
    given = {flag: paths[flag] / value if flag in paths else value for flag, value in changes.items()}
    if given.get("--train-data") == folder / "both":
        given["--train-data"] = f"{folder}/train.tar::{folder}/one.tar"
    code, out, err = run_command(capsys, *arguments(folder, **given))
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_two_ranks_equal_one_process(folder, capsys, tmp_path):
    given = arguments(folder, **{"--shots": [1, 2], "--seeds": 2, "--batch-size": 4, "--device": "cpu"})
    code, out, err = run_command(capsys, *given)
    assert code == 0, err
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    path = tmp_path / "two.json"
    run = subprocess.run(
        [*torchrun, "-m", "clipfast", *given, "--json", str(path)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(path.read_text()) == json.loads(out)
