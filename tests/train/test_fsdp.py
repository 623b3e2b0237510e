"""FSDP2: ranks that each hold a shard of the weights give the results of one process."""

import functools
import json
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from clipfast import create_model, pack_texts
from clipfast.distributed.dtensors import gather_full, is_dtensor, to_local
from clipfast.distributed.world import ALONE, joined
from clipfast.losses.accumulation import accumulate_gradients
from clipfast.models import CLIPConfig, SigLIPConfig, TextConfig, VisionConfig, build
from clipfast.runs.folder import RunFolder
from clipfast.train import TrainConfig
from clipfast.train.build import build_loss, build_model, build_parallel
from clipfast.train.fsdp import exchange_scalars, shard
from clipfast.train.fsdp_options import FSDP_OPTIMIZERS
from clipfast.train.guard import Guard
from clipfast.train.optim import make_optimizer
from clipfast.train.step import TrainingStep

from ..models.siglip import save_tokenizer
from ..processes import run_ranks
from ..small_runs import cases
from .distributed import CLIP, assert_like, trained
from .test_training import losses, results_of, saved_step

# No size is a multiple of 3. Some ranks have an empty shard of SigLIP's positions and query, whose first dimension is
# 1.
SIGLIP = SigLIPConfig(16, VisionConfig(24, 2, 16, 8, 2.0, 8), TextConfig(12, 300, 8, 1, 2)).to_dict()
RESNET = CLIP | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 8}}
MODELS = {"clip": CLIP, "siglip": SIGLIP, "resnet": RESNET}
# Options of runs of nine steps of 12 pairs, by the name of the run.
CASES = {
    "many": {
        "force_patch_dropout": 0.5, "grad_checkpointing": True, "grad_clip_norm": 0.5, "micro_batch_size": 3,
        "image_layer_decay": 0.7, "wd_exclude": ("*positional_embedding",),
    },
    "siglip": {"grad_clip_norm": 0.3, "micro_batch_size": 2, "ema_decay": 0.9, "fsdp_offload_cpu": True},
    "locked": {
        "ema_decay": 0.9, "grad_clip_norm": 0.5,
        "lock_text": True, "lock_text_unlocked_layers": 1, "lock_image": True, "lock_image_unlocked_groups": 1,
        "micro_batch_size": 2, "selective_checkpointing": True, "fsdp_no_reshard_after_forward": True,
    },
}  # fmt: skip
ONLY_FSDP = ("fsdp_no_reshard_after_forward", "fsdp_offload_cpu")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Return a function that returns the options of a training run under FSDP2 for a case, with changes."""
    made = tmp_path_factory.mktemp("made")
    for name, content in MODELS.items():
        (made / f"{name}.json").write_text(json.dumps(content))
    save_tokenizer(made / "tokenizer")

    def of_case(logs, case, **changes):
        """Return the options of a training run under FSDP2 for a case, with these changes."""
        is_siglip = case == "siglip"
        given = {
            "train_data": "synthetic:400", "model": f"{made}/{'siglip' if is_siglip else 'clip'}.json",
            "tokenizer": f"{made}/tokenizer" if is_siglip else None, "global_batch_size": 12,
            "train_num_samples": 105, "epochs": 1, "warmup": 2, "lr": 1e-3, "workers": 0, "log_every_n_steps": 1,
            "save_frequency": 0, "name": case, "logs": str(logs), "val_data": "synthetic:70@1", "fsdp": True,
        } | CASES[case] | changes  # fmt: skip
        return given if given["fsdp"] else {key: value for key, value in given.items() if key not in ONLY_FSDP}

    return of_case


@pytest.fixture(scope="module")
def one(options, tmp_path_factory):
    """Return the folders of runs on one process, with padded texts, with which those under FSDP2 are compared."""
    logs = tmp_path_factory.mktemp("one")
    for case in CASES:
        assert trained(ALONE, options(logs, case, pack_text=False)) is None
    return {case: RunFolder(logs / case) for case in CASES}


@pytest.mark.long
@pytest.mark.parametrize(("size", "cases"), [(2, ["locked"]), (3, ["many", "siglip"])])
def test_the_curve_and_the_evaluation_of_one_process(size, cases, one, options, together, tmp_path):
    """Some of the three ranks have an empty shard of a weight, and the five blocks of images are divided unevenly."""
    assert together(size, *((options(tmp_path, case),) for case in cases)) == [[None] * len(cases)] * size
    for case in cases:
        assert len(losses(one[case])) == 9
        assert_like(RunFolder(tmp_path / case), one[case])
        ours, theirs = results_of(tmp_path / case), results_of(one[case].path)
        assert ours["clip_val_loss"] == pytest.approx(theirs["clip_val_loss"], rel=1e-5)
        for key in ("images", "zero_shot", "retrieval"):
            assert ours[key] == theirs[key]


@pytest.mark.long
def test_ranks_and_kind_change_within_an_epoch(one, options, together, tmp_path):
    """A resumed run has more ranks, or uses DDP after FSDP."""
    sessions = [(2, True), (3, True), (2, False)]
    for number, (size, fsdp) in enumerate(sessions):
        given = options(tmp_path, "many", save_every=3, ema_decay=None, fsdp=fsdp)
        fate = ("stop", range(size), 4 + 3 * number) if number < 2 else None
        together(size, (given, number > 0, fate))
        assert saved_step(tmp_path / "many") == 3 * (number + 1)
    assert_like(RunFolder(tmp_path / "many"), one["many"])


def on_ranks(rank, size, work, *args):
    """Run ``work`` on sharded models in a group of training ranks, and return its result."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    with joined("cpu", 30) as world:
        return work(world, *args)


def in_parts(world, kind, **options):
    """Return a model to train, sharded if there are several ranks, and a batch; both are equal on all ranks."""
    torch.manual_seed(0)
    model = build(CLIPConfig.from_dict(MODELS[kind]))
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
    """Return the sharded gradients before and after clipping, and their norm, for each of the factors."""
    model, images, texts = in_parts(world, kind)
    guard = Guard(model, torch.optim.SGD(model.parameters(), 0.1), 0.25)
    share = 1 + (world.rank - (world.size - 1) / 2) / 2  # the ranks' gradients differ; their mean is fixed
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


@pytest.mark.long
def test_the_gradients_of_every_micro_batch_arrive_under_autocast():
    """Casts of weights that one micro-batch left to the next would get their gradients after FSDP2 has reduced."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, sharded = (create_model("ViT-T-8-32") for _ in range(2))
        sharded.load_state_dict(plain.state_dict())
        shard(TrainConfig(train_data="synthetic:1", fsdp=True), sharded, init_device_mesh("cpu", (1,)))
        images, texts = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.randint(1, 49407, (4, 9))
        for model in (plain, sharded):
            with torch.autocast("cpu", torch.bfloat16):
                accumulate_gradients(model, images, texts, 2)
        for (name, ours), expected in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            assert (to_local(ours.grad) - expected.grad).norm() <= 0.1 * expected.grad.norm(), name
    finally:
        dist.destroy_process_group()


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
KEPT, OFFLOADED = {"fsdp_no_reshard_after_forward": True}, {"fsdp_offload_cpu": True}
EAGER = [{}, FULL, SELECTIVE, KEPT | FULL, OFFLOADED | SELECTIVE]
ALL_COMPILED = [COMPILED, COMPILED | FULL, COMPILED | SELECTIVE | KEPT]
SIZES = (12, 2, 2)  # sizes of the micro-batches
TOLERANCES = {"fp32": 1e-5, "amp_bf16": 1e-2, "pure_bf16": 2e-2}
EVERY_DAY = [
    ("fp32", EAGER, SIZES),
    *((precision, [KEPT | FULL, OFFLOADED | SELECTIVE], (12, 2)) for precision in ("amp_bf16", "pure_bf16")),
    ("amp_bf16", ALL_COMPILED[2:], (2,)),  # each size is compiled again, which takes seconds
]
ALL = [(precision, EAGER + ALL_COMPILED, SIZES) for precision in TOLERANCES]


def stepped(world, model, precision, combination, sizes):
    """Return the losses of a training step for each size of micro-batches, and the weights after these steps.

    Several ranks pack the texts; one process does not.
    """
    torch.compiler.reset()
    config = TrainConfig(
        **TRAINED, **combination, model=model, precision=precision, torchcompile_backend="aot_eager", lr=1e-3,
        lock_text=True, lock_text_unlocked_layers=2, force_patch_dropout=0.4, pack_text=world.size > 1,
    )  # fmt: skip
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = build_model(config, {}, device, world)
    parallel = build_parallel(config, model, world, device)
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "amp_bf16")
    shards = world if world.size > 1 else None
    step = TrainingStep(
        model, make_optimizer(config, model), build_loss(config, model, world), autocast, 0.5, 12, parallel, shards
    )
    images, texts = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8), torch.randint(1, 49408, (12, 12))
    mine = slice(world.rank * 12 // world.size, (world.rank + 1) * 12 // world.size)
    found = []
    for micro_batch_size in sizes:
        step.micro_batch_size = min(micro_batch_size, 12 // world.size)
        torch.manual_seed(len(found))
        torch.rand(mine.start, 16)  # draw the random numbers of the pairs of earlier ranks
        parts = [pack_texts(part) for part in texts[mine].split(step.micro_batch_size)]
        loss = step(images[mine], (parts if len(parts) > 1 else parts[0]) if config.pack_text else texts[mine])
        found.append(world.mean(loss).item())
    return found, gather_full(model.state_dict(), keep=True)


@pytest.mark.long
@pytest.mark.parametrize("tried", [EVERY_DAY, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_combinations(tried, options, tmp_path):
    """Try the combinations of options in the table of docs/fsdp.md."""
    model = options(tmp_path, "many")["model"]
    cases = [(precision, made, sizes) for precision, combinations, sizes in tried for made in combinations]
    arguments = [(model, *case) for case in cases]
    everyones = run_ranks(on_ranks, 2, 2, each, stepped, arguments, folder=tmp_path, timeout=900)
    one_process = functools.cache(lambda precision, sizes: stepped(ALONE, model, precision, {}, sizes))
    for (precision, combination, sizes), *ranks_ in zip(cases, *everyones, strict=True):
        (expected, weights), tolerance = one_process(precision, sizes), TOLERANCES[precision]
        for found, mine in ranks_:
            assert found == pytest.approx(expected, rel=tolerance), combination
            for name, value in weights.items():
                assert mine[name].dtype == value.dtype
                if precision == "fp32" or value.ndim > 1:  # Adam moves a bias of 0 by its gradient's sign, maybe noise
                    assert (mine[name] - value).norm() <= tolerance * value.norm() + 1e-6, (name, combination)


@cases("""
fsdp=False fsdp_offload_cpu=True: --fsdp-offload-cpu needs --fsdp
fsdp=False fsdp_checkpoint=sharded: --fsdp-checkpoint sharded needs --fsdp
use_bn_sync=True: --use-bn-sync does not work with --fsdp
micro_batch_size=auto: --micro-batch-size auto does not work with --fsdp
opt=timm.optim:Lamb: --opt timm.optim:Lamb does not work with --fsdp, .* one of adamw
""")
def test_what_does_not_work_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**TRAINED | options)
