"""FSDP2: ranks that each hold a shard of the weights give the results of one process."""

import itertools
import os

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from clipfast.checkpoints.checkpoint import read_checkpoint
from clipfast.distributed.dtensors import gather_full, is_dtensor
from clipfast.distributed.world import ALONE, joined
from clipfast.models import build
from clipfast.models.registry import read_model_config
from clipfast.train import TrainConfig
from clipfast.train.fsdp import exchange_scalars, shard
from clipfast.train.fsdp_options import FSDP_OPTIMIZERS
from clipfast.train.guard import Guard
from clipfast.train.optim import make_optimizer

from ..processes import run_ranks
from ..small_runs import RESNET, SIGLIP, TINY
from .distributed import folder_of, trained
from .test_training import losses, weights

MODELS = {"clip": TINY, "siglip": SIGLIP, "resnet": RESNET}  # no weight's size is a multiple of 3, the number of ranks


def on_ranks(rank, size, work, *args):
    """Run ``work`` on sharded models in a group of training ranks, and return its result."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    with joined("cpu", 30) as world:
        return work(world, *args)


def in_parts(world, kind, **options):
    """Return a model to train, sharded if there are several ranks, and a batch; all ranks have the same values."""
    torch.manual_seed(0)
    model = build(read_model_config(MODELS[kind]))
    size = model.visual.image_size
    images = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8)
    if world.size > 1:
        shard(TrainConfig(**TRAINED, **options), model, init_device_mesh("cpu", (world.size,)))
    return model, images, torch.randint(1, 300, (6, 12))


TRAINED = {"train_data": "x.tar", "fsdp": True}


def objective(model, images, texts):
    """Return a number that depends on all outputs of a model, in place of a training loss."""
    image, text, scale, *bias = model(images, texts)
    return ((scale * image @ text.T + sum(bias)).square() * torch.arange(6)).mean()


def clipped(world, kind):
    """Return gradients before and after clipping, and their norm, for each of FACTORS, which scales the loss."""
    model, images, texts = in_parts(world, kind)
    guard = Guard(model, torch.optim.SGD(model.parameters(), 0.1), 0.25)
    share = 1 + (world.rank - (world.size - 1) / 2) / 2  # the gradients of ranks differ, but their mean is fixed
    found = []
    for factor in FACTORS:
        model.zero_grad()
        loss = objective(model, images, texts) * factor * share
        loss.backward()
        exchange_scalars(model, world)
        assert all(is_dtensor(x) == (world.size > 1 and x.ndim > 0) for x in model.parameters())
        before = gather_full({name: x.grad.clone() for name, x in model.named_parameters()}, keep=True)
        guard.judge(loss.detach())
        after = gather_full({name: x.grad for name, x in model.named_parameters()}, keep=True)
        found.append((before, guard.figures[1].clone(), after))
    return found


FACTORS = [1.0, 1e25, 1e-9, float("nan")]


def each(world, work, arguments):
    """Run ``work`` on each of several arguments in one group of training ranks, and return the results."""
    return [work(world, *one) for one in arguments]


def test_gradients_are_clipped_by_the_norm_of_all_parts(tmp_path):
    kinds = ("siglip", "resnet")
    everyones = run_ranks(on_ranks, 3, 3, each, clipped, [(kind,) for kind in kinds], folder=tmp_path)
    for number, kind in enumerate(kinds):
        for place, (before, norm, after) in enumerate(clipped(ALONE, kind)):
            expected = nn.utils.get_total_norm(before.values())
            torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0, equal_nan=True)
            for mine in everyones:
                own, theirs, clipped_too = mine[number][place]
                torch.testing.assert_close(theirs, norm, rtol=1e-4, atol=0, equal_nan=True)
                for name, value in before.items():
                    size = value.norm().nan_to_num().item()
                    torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-4 * size, equal_nan=True)
                    torch.testing.assert_close(clipped_too[name], after[name], rtol=1e-3, atol=1e-5, equal_nan=True)


def optimized(world, opt):
    """Return the weights after a few training steps of an optimizer, sharded or not."""
    model, images, texts = in_parts(world, "clip")
    momentum = {"momentum": 0.5} if opt in ("sgd", "rmsprop") else {}
    optimizer = make_optimizer(TrainConfig(**TRAINED, opt=opt, lr=1e-2, **momentum), model)
    for _ in range(3):
        optimizer.zero_grad()
        objective(model, images, texts).backward()
        exchange_scalars(model, world)
        optimizer.step()
    return gather_full(model.state_dict(), keep=True)


@pytest.mark.long
def test_optimizers(tmp_path):
    before = in_parts(ALONE, "clip")[0].state_dict()
    everyones = run_ranks(on_ranks, 3, 3, each, optimized, [(opt,) for opt in FSDP_OPTIMIZERS], folder=tmp_path)
    for opt, *found in zip(FSDP_OPTIMIZERS, *everyones, strict=True):
        expected = optimized(ALONE, opt)
        for mine in found:
            for name, value in expected.items():
                assert (mine[name] - value).norm() <= 2e-3 * (value - before[name]).norm() + 1e-6, (opt, name)


FULL, SELECTIVE, COMPILED = ({name: True} for name in ("grad_checkpointing", "selective_checkpointing", "torchcompile"))
KEPT, OFFLOADED, WHOLE = {"fsdp_no_reshard_after_forward": True}, {"fsdp_offload_cpu": True}, {"micro_batch_size": None}
EAGER = [{}, WHOLE, FULL, SELECTIVE, KEPT | FULL, OFFLOADED | SELECTIVE]
ALL_COMPILED = [COMPILED, COMPILED | FULL, COMPILED | SELECTIVE | KEPT]
TOLERANCES = {"fp32": 1e-5, "amp_bf16": 1e-2, "pure_bf16": 2e-2}
EVERY_DAY = [
    *(("fp32", made) for made in EAGER),
    *((precision, made) for precision in ("amp_bf16", "pure_bf16") for made in EAGER[-2:]),
    ("amp_bf16", ALL_COMPILED[-1]),
]
ALL = list(itertools.product(TOLERANCES, EAGER + ALL_COMPILED))


@pytest.mark.long
@pytest.mark.parametrize("tried", [EVERY_DAY, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_combinations(tried, options, together, tmp_path):
    """Try the combinations of options in the table of docs/fsdp.md against one process with padded texts."""
    torch.compiler.reset()

    def given(name, precision, **changes):
        """Return the options of a training run of three steps."""
        common = {
            "train_num_samples": 36, "micro_batch_size": 2, "lock_text": True, "lock_text_unlocked_layers": 2,
            "force_patch_dropout": 0.4, "grad_clip_norm": 0.5, "torchcompile_backend": "aot_eager",
        }  # fmt: skip
        return options(tmp_path, name, precision=precision, **common | changes)

    plain = {precision: given(precision, precision, pack_text=False) for precision in TOLERANCES}
    sharded = [given(str(number), precision, fsdp=True, **made) for number, (precision, made) in enumerate(tried)]
    assert [trained(ALONE, each) for each in plain.values()] == [None] * len(plain)
    together(2, *((each,) for each in sharded))
    for each in sharded:
        precision, run = each["precision"], folder_of(each)
        tolerance, reference = TOLERANCES[precision], folder_of(plain[precision])
        assert losses(run) == pytest.approx(losses(reference), rel=tolerance), each
        found = weights(run.path)
        for name, value in read_checkpoint(reference.latest)["state_dict"].items():
            assert found[name].dtype == value.dtype
            # Adam moves a bias that begins at 0 by the sign of its gradient, which may be noise.
            if precision == "fp32" or value.ndim > 1:
                assert (found[name] - value).norm() <= tolerance * value.norm() + 1e-6, (name, each)
