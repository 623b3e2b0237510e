"""DistillClipLoss and CoCaLoss in place of OpenCLIP's: values and gradients, in one process and in two."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from clipfast import CoCaLoss, DistillClipLoss
from clipfast.losses import distill_loss

from ..kernels.conftest import Recorded
from ..processes import run_ranks

open_clip = pytest.importorskip("open_clip")

DIM, TEACHER_DIM, PAIRS = 24, 16, 9
COMBINATIONS = list(itertools.product([False, True], repeat=2))
WEIGHTS = {"contrastive_loss": 2.5, "distill_loss": 0.7, "caption_loss": 1.3}
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)


def unit_rows(pairs, dim, seed):
    """Return random unit features of pairs, for the losses of a training step."""
    return F.normalize(torch.randn(pairs, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def inputs(scale=20.0, dtype=torch.float64, rank=0, pairs=PAIRS, shape=(), matched=0.0):
    """Return arguments of DistillClipLoss; with ``matched`` > 0, a pair's features are similar, as late in training."""
    image, teacher_image = unit_rows(pairs, DIM, 4 * rank), unit_rows(pairs, TEACHER_DIM, 4 * rank + 1)
    text, teacher_text = unit_rows(pairs, DIM, 4 * rank + 2), unit_rows(pairs, TEACHER_DIM, 4 * rank + 3)
    text, teacher_text = (
        F.normalize(theirs + matched * ours, dim=-1) for theirs, ours in ((text, image), (teacher_text, teacher_image))
    )
    found = {
        "image_features": image, "text_features": text, "logit_scale": torch.full(shape, scale),
        "dist_image_features": teacher_image, "dist_text_features": teacher_text,
        "dist_logit_scale": torch.full(shape, 1.5 * scale),
    }  # fmt: skip
    return {name: x.to(dtype) for name, x in found.items()}


def value_and_grads(loss, arguments, names=WEIGHTS):
    """Return the training losses by name, and the gradients of their sum for the student and the caption logits."""
    is_leaf = {
        name: x.is_floating_point() and not name.startswith("dist_") if isinstance(x, torch.Tensor) else False
        for name, x in arguments.items()
    }
    leaves = {name: x.clone().requires_grad_() if is_leaf[name] else x for name, x in arguments.items()}
    found = loss(**leaves, output_dict=True)
    sum(WEIGHTS[name] * value for name, value in found.items() if name in names).backward()
    grads = {f"d_{name}": leaves[name].grad for name in leaves if is_leaf[name] and leaves[name].grad is not None}
    return {name: value.detach() for name, value in found.items()} | grads


def test_distillation_compiled():
    arguments = inputs()
    compiled = torch.compile(DistillClipLoss(), backend="aot_eager", fullgraph=True)
    close(value_and_grads(compiled, arguments), value_and_grads(DistillClipLoss(), arguments))


@pytest.fixture
def small_strips(monkeypatch):
    """Make the distillation loss's strips so small that few pairs take several strips, the last with fewer rows."""
    monkeypatch.setattr(distill_loss, "STRIP_LOGITS", {"cpu": 1})
    monkeypatch.setattr(distill_loss, "LEAST_ROWS", 4)


@pytest.mark.usefixtures("small_strips")
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "FSDP"])
@pytest.mark.parametrize("scale", [0.0, 20.0, 300.0])
def test_distillation_in_one_process(scale, shape):
    arguments = inputs(scale, shape=shape)
    ours, theirs = (kind() for kind in (DistillClipLoss, open_clip.DistillClipLoss))
    found = value_and_grads(ours, arguments)
    close(found, value_and_grads(theirs, arguments))
    assert found["d_logit_scale"].shape == shape
    close(ours(**arguments), theirs(**arguments))
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    close(ours.dist_loss(*logits), theirs.dist_loss(*logits))


@pytest.mark.usefixtures("small_strips")
def test_distillation_late_in_training():
    """Small losses of large logits stay accurate: the errors are at most twice those of OpenCLIP."""
    errors = {DistillClipLoss: {}, open_clip.DistillClipLoss: {}}
    for seed in range(8):
        arguments = inputs(100.0, torch.float32, rank=seed, pairs=67, matched=1.0)
        arguments |= {f"dist_{name}": arguments[name] for name in ("image_features", "text_features")}
        in_double = {name: x.double() for name, x in arguments.items()}
        truth = value_and_grads(open_clip.DistillClipLoss(), in_double, ["distill_loss"])
        assert truth["distill_loss"] < 0.05
        for kind, summed in errors.items():
            for name, found in value_and_grads(kind(), arguments, ["distill_loss"]).items():
                summed[name] = summed.get(name, 0.0) + (found - truth[name]).abs().max().item()
    ours, theirs = errors.values()
    for name in ours.keys() - {"contrastive_loss"}:
        assert ours[name] <= 2 * theirs[name], name


def test_no_matrix_of_all_logits(monkeypatch):
    monkeypatch.setattr(distill_loss, "STRIP_LOGITS", {"cpu": 2**16})
    arguments = inputs(20.0, torch.float32, pairs=2048)
    with Recorded() as record:
        value_and_grads(DistillClipLoss(), arguments, ["distill_loss"])
    tensors = [x for _, _, out in record.calls for x in torch.utils._pytree.tree_leaves(out)]
    largest = max(x.numel() for x in tensors if isinstance(x, torch.Tensor))
    assert largest <= max(distill_loss.LEAST_ROWS * 2048, 2048 * DIM)


def test_distillation_under_autocast():
    arguments = inputs(20.0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = value_and_grads(DistillClipLoss(), arguments)
    rounded = {name: x.bfloat16().double() if x.ndim else x.double() for name, x in arguments.items()}
    assert all(x.dtype == torch.float32 for x in ours.values())
    expected = value_and_grads(DistillClipLoss(), rounded)
    torch.testing.assert_close({name: x.double() for name, x in ours.items()}, expected, rtol=1e-5, atol=1e-5)


def changed(name, change):
    """Return the arguments of the distillation loss with one of them changed."""
    arguments = inputs()
    return {**arguments, name: change(arguments[name])}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (changed("dist_image_features", lambda x: x[1:]), ValueError, "dist_image_features and dist_text_feat"),
        (changed("dist_logit_scale", lambda x: x.expand(2)), ValueError, "dist_logit_scale must have one element"),
        (changed("dist_text_features", lambda x: x.requires_grad_()), ValueError, "give dist_text_features.detach()"),
        (changed("text_features", lambda x: x.float()), TypeError, "text_features is float32, but image_features is"),
        (
            {**inputs(), **{name: x for name, x in inputs(pairs=7).items() if name.startswith("dist")}},
            ValueError, "dist_image_features must have the 9 rows of image_features, on cpu, got 7 on cpu",
        ),
    ],
)  # fmt: skip
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=f"DistillClipLoss: .*{message}"):
        DistillClipLoss()(**arguments)


def test_distillation_has_no_second_derivative():
    arguments = inputs()
    image = arguments["image_features"].requires_grad_()
    (grad,) = torch.autograd.grad(DistillClipLoss()(**arguments)[1], image, create_graph=True)
    with pytest.raises(NotImplementedError, match="DistillClipLoss: the distillation loss has no second derivative"):
        grad.sum().backward()


def caption_inputs(rank=0, shape=()):
    """Return arguments of CoCa's training loss: features, and the logits and labels of captions."""
    generator = torch.Generator().manual_seed(rank)
    features = {name: x for name, x in inputs(rank=rank, shape=shape).items() if not name.startswith("dist_")}
    logits = torch.randn(PAIRS, 5, 11, generator=generator, dtype=torch.float64)
    return {**features, "logits": logits, "labels": torch.randint(0, 4, (PAIRS, 5), generator=generator)}


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "FSDP"])
@pytest.mark.parametrize("options", [{"pad_id": 3}, {"clip_loss_weight": 0.0}])
def test_captions_in_one_process(options, shape):
    kinds = CoCaLoss, open_clip.CoCaLoss
    ours, theirs = (kind(**{"caption_loss_weight": 2.0, "clip_loss_weight": 0.5} | options) for kind in kinds)
    arguments = caption_inputs(shape=shape)
    close(value_and_grads(ours, arguments), value_and_grads(theirs, arguments))
    close(ours(**arguments), theirs(**arguments))


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.3])
@pytest.mark.parametrize("pad_id", [-1, 3])
@pytest.mark.parametrize("compute_dtype", [torch.float64, torch.float32])
def test_captions_as_from_open_clip_4_on(z_loss_weight, pad_id, compute_dtype):
    arguments = caption_inputs()
    labels = arguments["labels"]
    labels[0], labels[1, 2:] = -100, -100
    is_float32 = compute_dtype == torch.float32
    options = {"z_loss_weight": z_loss_weight, "compute_dtype": compute_dtype if is_float32 else "model"}
    loss = CoCaLoss(2.0, 0.5, pad_id=None if pad_id < 0 else pad_id, **options)
    found = value_and_grads(loss, arguments)
    logits = arguments["logits"].clone().requires_grad_()
    counts = (labels != -100) & (labels != pad_id)
    scores = logits[counts].to(compute_dtype)
    entropy, square = F.cross_entropy(scores, labels[counts]), scores.logsumexp(-1).square().mean()
    expected = 2.0 * entropy + z_loss_weight * square
    (WEIGHTS["caption_loss"] * expected).backward()
    own = {"caption_loss": expected, "caption_loss_ce": entropy, "d_logits": logits.grad}
    tolerance = {"rtol": 1e-5, "atol": 1e-7, "check_dtype": False}
    torch.testing.assert_close({name: found[name] for name in own}, own, **tolerance)
    assert ("caption_loss_z" in found) == (z_loss_weight > 0)
    # A model may compute the caption losses itself, and return them as caption_loss_ce and caption_loss_z.
    given = {key: x for key, x in arguments.items() if key not in ("logits", "labels")}
    of_model = {"caption_loss_ce": entropy, "caption_loss_z": square if z_loss_weight else None}
    torch.testing.assert_close(loss(**given, **of_model)[1], expected, **tolerance)
    with pytest.raises(ValueError, match="give logits and labels, or caption_loss_ce"):
        loss(**given)
    if z_loss_weight:
        with pytest.raises(ValueError, match="but the model gave no caption_loss_z"):
            loss(**given, **of_model | {"caption_loss_z": None})


def every_combination(rank, world_size):
    """Return the distillation and CoCa losses of clipfast and OpenCLIP on this rank for each way to gather features."""
    # The fixture small_strips has no effect here, since each rank is a process of its own.
    distill_loss.STRIP_LOGITS, distill_loss.LEAST_ROWS = {"cpu": 1}, 4
    found = []
    for local_loss, gather_with_grad in COMBINATIONS:
        ranks = {"rank": rank, "world_size": world_size}
        options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, **ranks}
        both = [kind(**options) for kind in (DistillClipLoss, open_clip.DistillClipLoss)]
        captions = [kind(2.0, 0.5, **options) for kind in (CoCaLoss, open_clip.CoCaLoss)]
        found.append(
            {
                "distill": [value_and_grads(loss, inputs(rank=rank, shape=(1,)), ["distill_loss"]) for loss in both],
                "both": [value_and_grads(loss, inputs(rank=rank)) for loss in both],
                "captions": [value_and_grads(loss, caption_inputs(rank)) for loss in captions],
            }
        )
    return found


def test_two_ranks(tmp_path):
    by_rank = run_ranks(every_combination, 2, 2, folder=tmp_path)
    for index, combination in enumerate(COMBINATIONS):
        ranks = [found[index] for found in by_rank]
        for found in ranks:
            close(*found["distill"])
            for kind in ("both", "captions"):
                ours, theirs = (dict(result) for result in found[kind])
                # As in ClipLoss, a rank's gradient of logit_scale differs from OpenCLIP's, and its
                # mean over ranks is equal.
                if combination == (True, True):
                    del ours["d_logit_scale"], theirs["d_logit_scale"]
                close(ours, theirs)
        for kind in ("both", "captions"):
            close(*(torch.stack([found[kind][which]["d_logit_scale"] for found in ranks]).mean() for which in (0, 1)))
