"""Test that gradients accumulated over micro-batches equal those of one graph, also with dropout and batch
normalisation.
"""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from clipfast import CLIP, ClipLoss, SigLipLoss, accumulate_gradients, largest_micro_batch, pack_texts
from clipfast.kernels import contrastive_loss, distributed_contrastive_loss
from clipfast.models import CLIPConfig

from ..processes import run_ranks

DIM, LENGTH, SIZE, VOCABULARY = 16, 6, 32, 50
TEXT = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 1}
VISION = {
    "ViT": {"image_size": SIZE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16},
    "ResNet": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
}


class Toy(nn.Module):
    """A small model of two towers with dropout, batch normalisation, a logit scale and, on request, a logit bias."""

    def __init__(self, bias=False, output_dict=False):
        super().__init__()
        self.output_dict = output_dict
        self.columns, self.norm = nn.Linear(SIZE, 2 * DIM), nn.BatchNorm1d(2 * DIM)
        self.image_dropout, self.text_dropout = nn.Dropout(0.3), nn.Dropout(0.3)
        self.project, self.words = nn.Linear(2 * DIM, DIM), nn.Embedding(VOCABULARY, DIM)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-1.0)) if bias else None

    def forward(self, images, texts):
        """Compute the features of a model with dropout and BatchNorm, whose gradients are accumulated."""
        pooled = self.norm(F.gelu(self.columns(images.to(self.logit_scale.dtype))).mean((1, 2)))
        image = F.normalize(self.project(self.image_dropout(pooled)), dim=-1)
        text = F.normalize(self.text_dropout(self.words(texts)).mean(1), dim=-1)
        if not self.output_dict:
            return image, text, self.logit_scale.exp(), self.logit_bias
        output = {"image_features": image, "text_features": text, "logit_scale": self.logit_scale.exp()}
        return output if self.logit_bias is None else output | {"logit_bias": self.logit_bias}


def clip(tower, dtype=torch.float64, **vision):
    """Return a CLIP model whose gradients are accumulated over micro-batches."""
    model = CLIP(CLIPConfig.from_dict({"embed_dim": DIM, "vision_cfg": VISION[tower] | vision, "text_cfg": TEXT}))
    for name, parameter in model.named_parameters():
        if "bn3.weight" in name:
            nn.init.ones_(parameter)  # zero at first, which would make most gradients of a block zero
    return model.to(dtype)


def batch(pairs=16, dtype=torch.float64):
    """Draw images and texts, which micro-batches divide."""
    return torch.randn(pairs, 3, SIZE, SIZE, dtype=dtype), torch.randint(0, VOCABULARY, (pairs, LENGTH))


def in_one_graph(model, images, texts, size, loss=contrastive_loss):
    """Return the expected loss, after a backward pass through the graphs of all micro-batches at once."""
    parts = [model(*part) for part in zip(images.split(size), texts.split(size), strict=True)]
    parts = [tuple(part.values()) if isinstance(part, dict) else part for part in parts]
    features = [torch.cat([part[side] for part in parts]) for side in (0, 1)]
    value = loss(*features, *(x for x in parts[-1][2:] if x is not None))
    value.backward()
    return value.detach()


def gradients(model):
    """Return the accumulated gradients of a model by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agree(model, truth, rel):
    """Check accumulated gradients against those of one graph up to ``rel``, relatively, and buffers to the last bit."""
    ours, theirs = gradients(model), gradients(truth)
    assert ours.keys() == theirs.keys() != set()
    largest = max(theirs[name].norm() for name in theirs)
    for name, expected in theirs.items():
        # The relative difference says nothing about a gradient that is zero up to rounding.
        assert (ours[name] - expected).norm() <= rel * max(expected.norm(), 1e-3 * largest), name
    for (name, ours), theirs in zip(model.named_buffers(), truth.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def both(model, data, size, loss=contrastive_loss, whole=False):
    """Return a model after a step in micro-batches and its copy after the step in one graph, from the same seed."""
    truth = copy.deepcopy(model)
    torch.manual_seed(1)
    ours = accumulate_gradients(model, *data, size, loss)
    left = torch.get_rng_state()
    torch.manual_seed(1)
    theirs = in_one_graph(truth, *data, len(data[0]) if whole else size, loss)
    assert ours == pytest.approx(theirs.item(), rel=1e-12 if ours.dtype == torch.float64 else 1e-5)
    if not whole:
        assert torch.equal(left, torch.get_rng_state())
    return model, truth


@pytest.mark.parametrize("size", [5, 16])
def test_texts_that_are_packed_for_each_micro_batch_are_as_the_whole_batch(size):
    model, (images, texts) = clip("ViT"), batch()
    truth = copy.deepcopy(model)
    ours = accumulate_gradients(model, images, [pack_texts(part) for part in texts.split(size)], size)
    truth.pack_text = False
    assert ours == pytest.approx(in_one_graph(truth, images, texts, 16).item(), rel=1e-12)
    agree(model, truth, rel=1e-12)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_vision_transformer_is_as_the_whole_batch(size):
    agree(*both(clip("ViT"), batch(16 if size > 1 else 4), size, whole=True), rel=1e-12)


def test_patch_dropout_is_as_the_whole_batch():
    # The random numbers that choose the patches of a pair are the same in micro-batches of any size.
    model = clip("ViT", patch_dropout=0.5)
    model.set_grad_checkpointing(True)
    agree(*both(model, batch(), 4, whole=True), rel=1e-12)


@pytest.mark.parametrize(("dtype", "rel", "size"), [(torch.float64, 1e-12, 6), (torch.float32, 1e-5, 2)])
def test_dropout_and_batch_norm_are_as_one_graph_of_micro_batches(dtype, rel, size):
    model = Toy().to(dtype)
    data = batch(16, dtype)
    agree(*both(model, data, size), rel=rel)
    assert model.norm.num_batches_tracked == -(-16 // size)


@pytest.mark.parametrize("frozen", [False, True])
def test_resnet(frozen):
    model = clip("ResNet").train()
    for module in model.modules():
        if frozen and isinstance(module, nn.BatchNorm2d):
            module.eval()
    agree(*both(model, batch(), 4, whole=frozen), rel=1e-10)


def test_a_state_that_features_depend_on_is_replayed():
    class Drifting(Toy):
        """A model whose features depend on a buffer that the forward pass changes, as in spectral normalisation."""

        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.ones((), dtype=torch.float64))

        def forward(self, images, texts):
            """Compute features that depend on a state which every pass of the accumulation changes."""
            self.state = self.state * 1.5
            image, *rest = super().forward(images, texts)
            return (image * self.state, *rest)

    agree(*both(Drifting().double(), batch(), 4), rel=1e-12)


def test_buffers_and_generators_are_as_after_one_pass_in_spite_of_checkpointing():
    class Recomputed(Toy):
        """A model whose forward pass runs again in the backward pass, and then updates BatchNorm's statistics again."""

        def forward(self, images, texts):
            """Compute features under activation checkpointing, inside of the passes of the accumulation."""
            if not torch.is_grad_enabled():
                return super().forward(images, texts)
            return checkpoint(super().forward, images, texts, use_reentrant=False)

    def loss(*features):
        """Return a loss of accumulated gradients that draws a random number."""
        return contrastive_loss(*features) * torch.rand(())

    model = Recomputed().double()
    both(model, batch(), 4, loss)
    assert model.norm.num_batches_tracked == 4


@pytest.mark.parametrize("output_dict", [False, True])
def test_losses_with_a_bias(output_dict):
    model = Toy(bias=True, output_dict=output_dict).double()
    agree(*both(model, batch(), 4, lambda *x: SigLipLoss()(*x) + x[0].square().sum()), rel=1e-12)
    assert model.logit_bias.grad is not None


def test_gradients_are_added_and_scaled():
    model = clip("ViT")
    data = batch()
    accumulate_gradients(model, *data, 4)
    once = {name: gradient.clone() for name, gradient in gradients(model).items()}
    loss = accumulate_gradients(model, *data, 4, loss_scale=torch.tensor(1024.0))
    assert loss == pytest.approx(accumulate_gradients(copy.deepcopy(model), *data, 16).item(), rel=1e-12)
    assert not loss.requires_grad
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 1025 * once[name], rtol=1e-9, atol=1e-12)


def test_frozen_tower():
    model = clip("ViT")
    model.visual.requires_grad_(False)
    agree(*both(model, batch(), 4), rel=1e-12)
    model.requires_grad_(False)  # every parameter but the scale is frozen
    model.zero_grad()
    model.logit_scale.requires_grad_()
    agree(*both(model, batch(), 4), rel=1e-12)


def test_autocast():
    model, data = clip("ViT", torch.float32), batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, truth = both(model, data, 4)
    agree(ours, truth, rel=2e-2)
    assert len(gradients(ours)) == len(list(ours.parameters()))


def test_bad_input_changes_nothing():
    model = Toy().double()
    images, texts = batch()
    state = torch.get_rng_state()
    for arguments, message in (
        ((images, texts, 0), "at least 1, got 0"),
        ((images[:0], texts[:0], 4), "got 0 and 0"),
        ((images, texts[:-1], 4), "got 16 and 15"),
        ((images, pack_texts(texts), 5), r"micro-batches of \[5, 5, 5, 1\] images .* got \[16\]"),
        ((images, [*texts.split(5)[:3], texts[:2]], 5), r"\[5, 5, 5, 1\] images .* got \[5, 5, 5, 2\]"),
        ((images, [{"ids": texts[:5]}] * 3, 5), r"\[5, 5, 5, 1\] images .* got \[None, None, None\]"),
    ):
        for call in (accumulate_gradients, lambda *x: largest_micro_batch(*x[:3], start=x[3])):
            with pytest.raises(ValueError, match=message):
                call(model, *arguments)
    assert torch.equal(state, torch.get_rng_state())
    assert gradients(model) == {}
    assert model.norm.num_batches_tracked == 0


class Other(nn.Linear):
    """A model that returns the result of the function ``output`` on its features of images, and the texts."""

    def __init__(self, output):
        super().__init__(4, 4)
        self.output = output

    def forward(self, images, texts):
        """Return something else than the accumulation expects of a model."""
        return self.output(super().forward(images), texts)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda image, text: image, "must return .*, got Tensor"),
        (lambda image, text: (image, text), "must return .*, got tuple"),
        (lambda image, text: (image, None, 1.0), r"got \(Tensor, NoneType, float\)"),
        (lambda image, text: {"logits": image}, "must return .*, got dict"),
        (lambda image, text: (image[:1], text, 1.0), "one feature per image and text, got 4 and 16 for 16"),
    ],
)
def test_a_model_that_returns_something_else(output, message):
    with pytest.raises((TypeError, ValueError), match=message):
        accumulate_gradients(Other(output), torch.randn(16, 4), torch.randn(16, 4), 4)


def test_a_loss_that_is_no_number():
    model, data = clip("ViT"), batch()
    for loss in (lambda image, text, scale: (image * text).sum(1), lambda *x: ClipLoss()(*x, output_dict=True)):
        with pytest.raises(TypeError, match=r"one element, got (shape \(16,\)|dict)"):
            accumulate_gradients(model, *data, 4, loss)


def test_activations_are_those_of_a_micro_batch():
    data = batch(32)
    most = {size: most_saved(clip("ViT"), data, size) for size in (4, 32)}
    assert most[4] < most[32] / 5


def most_saved(model, data, size):
    """Return the most bytes that graphs held at once for their backward passes, without the weights and their views."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = most = 0

    def pack(tensor):
        """Count the bytes of a tensor that the graph of a micro-batch holds for its backward pass."""
        nonlocal held, most
        saved = tensor.detach()
        if tensor.untyped_storage().data_ptr() not in weights:
            held += tensor.nbytes
            weakref.finalize(saved, release, tensor.nbytes)
            most = max(most, held)
        return saved

    def release(size):
        """Subtract the bytes of a micro-batch's graph that was freed."""
        nonlocal held
        held -= size

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        accumulate_gradients(model, *data, size)
    return most


def on_rank(rank, world_size):
    """Return a rank's gradients by three sizes of micro-batches under DistributedDataParallel, and those of one graph.

    The number of exchanges between ranks comes with the gradients of each size.
    """
    torch.manual_seed(0)
    whole = batch(6 * world_size)
    data = [x[6 * rank : 6 * rank + 6] for x in whole]
    found = []
    for size in (6, 4, 2):
        torch.manual_seed(0)
        model = DistributedDataParallel(clip("ViT"))
        exchanges = []
        model.register_comm_hook(exchanges, count_exchanges)
        accumulate_gradients(model, *data, size, distributed_contrastive_loss)
        found.append((gradients(model.module), len(exchanges)))
    torch.manual_seed(0)
    model = clip("ViT")
    in_one_graph(model, *whole, len(whole[0]))
    return found, gradients(model)


def count_exchanges(exchanges, bucket):
    """Count an exchange of gradients by DistributedDataParallel, and carry it out."""
    exchanges.append(1)
    return allreduce_hook(None, bucket)


def test_distributed_data_parallel(tmp_path):
    for found, expected in run_ranks(on_rank, 2, 2, folder=tmp_path):
        for gradient, exchanges in found:
            assert exchanges == found[0][1]
            for name, value in expected.items():
                assert (gradient[name] - value).norm() <= 1e-10 * value.norm().clamp(min=1e-3), name
