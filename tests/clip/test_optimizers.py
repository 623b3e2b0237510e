"""The optimizer of a run: its class and arguments, its groups with their rates and decays, and how a run goes on."""

import pytest
import torch

from clipfast import get_model_config
from clipfast.checkpoint import CheckpointError, read_checkpoint
from clipfast.models import build
from clipfast.models.registry import read_model_config
from clipfast.training import TrainConfig
from clipfast.training.loop import train
from clipfast.training.optim import MuonAndAdamW, make_optimizer, parse_arguments
from clipfast.training.schedule import set_lr

from .conftest import TINY, run_command
from .test_training import config, losses, same, whole_and_resumed


class Half(torch.optim.SGD):
    """An optimizer that another package could have."""

    def __init__(self, params, lr=1.0, betas=(0.5, 0.6), weight_decay=0.0, **others):
        super().__init__(params, lr=lr / 2, weight_decay=weight_decay, **others)
        self.betas = betas


class Passing(torch.optim.AdamW):
    """One that passes on what it is given."""

    def __init__(self, params, lr=1e-3, **others):
        super().__init__(params, lr, **others)


class Reading(torch.optim.SGD):
    """One that needs the values of the weights, and takes no scale beyond 1."""

    def __init__(self, params, lr=1.0, weight_decay=0.0, scale=1.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        if scale > 1:
            raise RuntimeError("scale is too large")
        self.largest = max(weight.abs().max().item() for group in self.param_groups for weight in group["params"])


IMPORTED = f"{__name__}:Half"
BLOCK = "transformer.resblocks"


def built(name):
    with torch.device("meta"):
        return build(read_model_config(TINY) if name == TINY else get_model_config(name))


@pytest.fixture(scope="module")
def model():
    return built(TINY)


def made(model, **options):
    return make_optimizer(TrainConfig(train_data="x.tar", **options), model)


def names_of(model, group):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for parameter in group["params"]}


@pytest.mark.parametrize(
    ("options", "kind", "defaults"),
    [
        ({}, torch.optim.AdamW, {"betas": (0.9, 0.98), "eps": 1e-6, "fused": True}),
        ({"opt": "AdamW", "beta2": 0.5, "eps": 1e-3}, torch.optim.AdamW, {"betas": (0.9, 0.5), "eps": 1e-3}),
        ({"opt": "adam"}, torch.optim.Adam, {"betas": (0.9, 0.98), "decoupled_weight_decay": False, "fused": True}),
        ({"opt": "nadamw"}, torch.optim.NAdam, {"decoupled_weight_decay": True, "eps": 1e-6}),
        (
            {"opt": "sgd", "momentum": 0.8, "opt_kwargs": ("nesterov=True",)},
            torch.optim.SGD,
            {"momentum": 0.8, "nesterov": True},
        ),
        ({"opt": "rmsprop", "opt_kwargs": ("alpha=0.5", "eps=0.1")}, torch.optim.RMSprop, {"alpha": 0.5, "eps": 0.1}),
        ({"opt": "adamw", "opt_kwargs": ("betas=(0.1, 0.2)",)}, torch.optim.AdamW, {"betas": (0.1, 0.2)}),
        ({"opt": "torch.optim:Adagrad", "eps": 0.5}, torch.optim.Adagrad, {"eps": 0.5}),
        ({"opt_kwargs": ("foreach=TRUE", "amsgrad=false")}, torch.optim.AdamW, {"foreach": True, "amsgrad": False}),
        ({"opt_kwargs": ("fused=False",)}, torch.optim.AdamW, {"fused": False}),
    ],
)
def test_classes_and_arguments(model, options, kind, defaults):
    optimizer = made(model, **options)
    assert type(optimizer) is kind
    assert {key: optimizer.defaults[key] for key in defaults} == defaults


def test_resnets_have_betas_of_their_own():
    optimizer = made(built("RN50"), opt="adam")
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)


def test_an_import_path_keeps_the_defaults_of_its_class(model):
    optimizer = made(model, opt=IMPORTED)
    assert type(optimizer).__name__ == "Half"
    assert optimizer.betas == (0.5, 0.6)
    assert made(model, opt=IMPORTED, beta2=0.7).betas == (0.9, 0.7)
    passing = made(model, opt=f"{__name__}:Passing", beta2=0.7).defaults
    assert (passing["betas"], passing["eps"]) == ((0.9, 0.7), 1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opt": "lion"}, "--opt must be one of adadelta, adafactor, .*, or an import path such as timm.*, got 'lion'"),
        ({"opt": "lbfgs"}, "--opt must be one of"),
        ({"opt": "optimizer"}, "--opt must be one of"),
        ({"opt": "lambda"}, "--opt must be one of .* such as timm.optim:Lamb, or timm/lamb, got 'lambda'"),
        ({"opt": "no_such_package:X"}, "--opt no_such_package:X cannot be imported: No module named"),
        ({"opt": "torch.optim:None_"}, "cannot be imported: module 'torch.optim' has no attribute 'None_'"),
        ({"opt": "os:system"}, "--opt os:system is not a subclass of torch.optim.Optimizer"),
        ({"opt": "sgd", "beta2": 0.9}, "--opt sgd has no argument betas: leave out --beta1 and --beta2"),
        ({"opt": "sgd", "eps": 0.9}, "--opt sgd has no argument eps: leave out --eps"),
        ({"opt": "adamw", "momentum": 0.9}, "--opt adamw has no argument momentum: leave out --momentum"),
        ({"opt": "rprop"}, "--opt rprop has no argument weight_decay: set --wd 0"),
        ({"opt": "sgd", "cuda_graphs": True}, "--opt sgd has no argument capturable: leave out --cuda-graphs"),
        ({"opt": "muon", "cuda_graphs": True}, "--opt muon cannot be captured in a graph"),
        ({"opt": "nadam", "cuda_graphs": True}, "--opt nadam cannot be captured in a graph: the host must tell it"),
        ({"opt_kwargs": ("fused=False",), "cuda_graphs": True}, "--opt adamw cannot be captured in a graph"),
        ({"opt": "adamw", "opt_kwargs": ("beta=1",)}, "--opt adamw does not take one of its options: .*'beta'"),
        ({"opt": "muon", "opt_kwargs": ("steps=1",)}, "--opt muon does not take one of its options: .*'steps'"),
        (
            {"opt": "adafactor", "eps": 1e-8},
            r"--opt adafactor does not take one of its options: .*; they are eps=1e-08: correct the flag that sets it",
        ),
        ({"opt_kwargs": ("foreach=True", "fused=True")}, "does not take one of its options: .*fused.*foreach=True, fu"),
        ({"opt": "sgd", "opt_kwargs": ("nesterov=true",)}, "does not take one of its options: Nesterov momentum .*=Tr"),
        ({"opt_kwargs": ("lr=0.1",)}, "--opt-kwargs must not set lr: use --lr"),
        ({"opt": "muon", "opt_kwargs": ("weight_decay=1",)}, "--opt-kwargs must not set weight_decay: use --wd"),
        ({"opt_kwargs": ("amsgrad",)}, "--opt-kwargs must be name=value, got 'amsgrad'"),
        ({"opt_kwargs": ("=1",)}, "--opt-kwargs must be name=value, got '=1'"),
        ({"wd_exclude": ("*.bias", "positional")}, "--wd-exclude 'positional' is the name of no parameter"),
        ({"image_layer_decay": 0.0}, "--image-layer-decay must be more than 0, got 0.0"),
        ({"text_layer_decay": 1.5}, "--text-layer-decay must be at most 1, got 1.5"),
    ],
)
def test_what_cannot_work(model, options, message):
    with pytest.raises(ValueError, match=message):
        made(model, **options)


def test_arguments_are_literals_or_strings():
    words = ["a=1", "b=(1, 2.5)", "c=True", "d=match_rms", "e=x=y", "f=", "g=false", "h=NONE"]
    expected = {"a": 1, "b": (1, 2.5), "c": True, "d": "match_rms", "e": "x=y", "f": "", "g": False, "h": None}
    assert parse_arguments(words) == expected


def test_one_that_reads_the_weights_is_made_where_they_are(model):
    name = f"{__name__}:Reading"
    with pytest.raises(
        NotImplementedError, match=r"test_optimizers:Reading reads the values of parameters: Tensor\.item"
    ):
        made(model, opt=name)
    assert made(build(read_model_config(TINY)), opt=name).largest > 0
    with pytest.raises(ValueError, match=r"Reading does not take one of its options: scale is too large; .* scale=2\b"):
        made(model, opt=name, opt_kwargs=("scale=2",))


def test_weight_decay_leaves_out_what_patterns_name(model):
    plain, decayed = made(model, wd=0.3).param_groups
    assert {name for name, parameter in model.named_parameters() if parameter.ndim < 2} == names_of(model, plain)
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.3)
    assert "lr_scale" not in plain
    fewer = made(model, wd_exclude=("*positional_embedding", "visual.proj")).param_groups
    moved = {"positional_embedding", "visual.positional_embedding", "visual.proj"}
    assert names_of(model, fewer[0]) == names_of(model, plain) | moved
    assert names_of(model, fewer[1]) == names_of(model, decayed) - moved


def scales_of(model, optimizer):
    return {name: group["lr_scale"] for group in optimizer.param_groups for name in names_of(model, group)}


# By the beginning of a name: how many layers lie between it and the output of its tower.
VIT = {
    "visual.conv1": 3, "visual.class_embedding": 3, "visual.positional_embedding": 3, "visual.ln_pre": 3,
    "visual.transformer.resblocks.0": 2, "visual.transformer.resblocks.1": 1, "visual.ln_post": 1, "visual.proj": 0,
}  # fmt: skip
TEXT = {
    "token_embedding": 3, "positional_embedding": 3, "transformer.resblocks.0": 2, "transformer.resblocks.1": 1,
    "ln_final": 1, "text_projection": 0,
}  # fmt: skip
RESNET = {
    "visual.conv": 5, "visual.bn": 5, "visual.layer1": 4, "visual.layer2": 3, "visual.layer3": 2, "visual.layer4": 1,
    "visual.attnpool": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "depths"),
    [
        (TINY, {"image_layer_decay": 0.5}, VIT),
        (TINY, {"text_layer_decay": 0.5}, TEXT),
        (TINY, {"image_layer_decay": 0.5, "text_layer_decay": 0.5}, VIT | TEXT),
        ("RN50", {"image_layer_decay": 0.5}, RESNET),
    ],
)
def test_rates_fall_from_layer_to_layer(name, options, depths):
    model = built(name)
    optimizer = made(model, lr=0.1, **options)
    scales = scales_of(model, optimizer)
    expected = {
        name: 0.5 ** next((depth for start, depth in depths.items() if name.startswith(start)), 0)
        for name, _ in model.named_parameters()
    }
    assert scales == expected
    rates = {name: group["lr"] for group in optimizer.param_groups for name in names_of(model, group)}
    assert rates == pytest.approx({name: 0.1 * scale for name, scale in expected.items()})
    by_decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in names_of(model, group)}
    assert all((by_decay[name] == 0) == (parameter.ndim < 2) for name, parameter in model.named_parameters())


def test_rates_of_a_graph_are_tensors_of_their_own():
    optimizer = made(build(read_model_config(TINY)), cuda_graphs=True, image_layer_decay=0.5, lr=1.0)
    set_lr(optimizer, 2.0)
    assert all(group["lr"].item() == 2 * group["lr_scale"] for group in optimizer.param_groups)
    assert len({group["lr"].item() for group in optimizer.param_groups}) == 4


def test_muon_takes_matrices_and_adamw_the_rest(model):
    optimizer = made(model, opt="muon", momentum=0.9, opt_kwargs=("ns_steps=3",), image_layer_decay=0.5)
    muon, adamw = optimizer.parts
    assert {"momentum": 0.9, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"}.items() <= muon.defaults.items()
    tables = {"token_embedding.weight", "positional_embedding", "visual.positional_embedding"}
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim == 2} - tables
    assert set().union(*(names_of(model, group) for group in muon.param_groups)) == matrices
    others = set().union(*(names_of(model, group) for group in adamw.param_groups))
    assert others | matrices == {name for name, _ in model.named_parameters()}
    assert not others & matrices
    set_lr(optimizer, 1.0)
    assert {group["lr"] for group in muon.param_groups} == {0.25, 0.5, 1.0}


def test_muon_steps_like_its_two_parts():
    ours, theirs = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
    theirs.load_state_dict(ours.state_dict())
    parts = [torch.optim.Muon([theirs.weight], lr=0.1), torch.optim.AdamW([theirs.bias], lr=0.1)]
    both = MuonAndAdamW(torch.optim.Muon([ours.weight], lr=0.1), torch.optim.AdamW([ours.bias], lr=0.1))
    for _ in range(3):
        for linear in (ours, theirs):
            linear.zero_grad()
            linear(torch.ones(2, 6)).square().sum().backward()
        both.step()
        for part in parts:
            part.step()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"opt": "muon", "image_layer_decay": 0.7},
        {"opt": "sgd", "momentum": 0.9, "opt_kwargs": ("nesterov=True",)},
        {"opt": IMPORTED},
        {"wd_exclude": ("*.weight",), "text_layer_decay": 0.7},
    ],
    ids=["muon", "sgd", "imported", "rates"],
)
def test_training_goes_on_to_the_last_bit(shards, tmp_path, options):
    whole, folder = whole_and_resumed(shards, tmp_path, **options, workers=0)
    assert losses(whole)[-1] < losses(whole)[0]
    assert same(whole.path, folder.path)


def test_another_optimizer_cannot_go_on(shards, tmp_path):
    folder, _ = train(config(shards, tmp_path, workers=0, wd_exclude=(f"{BLOCK}.0.mlp.c_fc.weight",)))
    before = folder.latest.read_bytes()
    for options, message in (
        (
            {"opt": "adam"},
            "holds the optimizer state of --opt adamw, and this run has --opt adam: leave --opt as it was",
        ),
        ({"lock_text": True}, "does not fit the model: .*must stay: locked towers"),
        ({"wd_exclude": ("visual.proj",)}, "does not fit the model: .*must stay: .*--wd-exclude"),
        ({"image_layer_decay": 0.5}, "does not fit the model: .*--image-layer-decay"),
        # another parameter of the same shape, so that the groups are as large as they were
        ({"wd_exclude": (f"{BLOCK}.1.mlp.c_fc.weight",)}, "does not fit the model: its groups hold other parameters"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(config(shards, tmp_path, epochs=3, **options), folder.latest)
    assert folder.latest.read_bytes() == before
    # without what clipfast notes it is a checkpoint of OpenCLIP, whose optimizer is AdamW
    checkpoint = read_checkpoint(folder.latest)
    del checkpoint["clipfast"]
    torch.save(checkpoint, tmp_path / "theirs.pt")
    with pytest.raises(CheckpointError, match="holds the optimizer state of --opt adamw, and this run has --opt sgd"):
        train(config(shards, tmp_path / "theirs", opt="sgd"), tmp_path / "theirs.pt")
    # and it does not say which parameters are in its groups: what can be seen is the shapes of their moments
    other = {"epochs": 3, "wd_exclude": ("text_projection",)}
    with pytest.raises(CheckpointError, match="does not fit the model: its moments have other shapes"):
        train(config(shards, tmp_path / "theirs", **other), tmp_path / "theirs.pt")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.long
def test_a_checkpoint_of_open_clip_main_goes_on(shards, tmp_path):
    """Its groups are those of 3.3.0 but for the embeddings of positions and classes, which have no weight decay."""
    names = ("positional_embedding", "visual.positional_embedding", "visual.class_embedding")
    folder, _ = train(config(shards, tmp_path, workers=0, wd_exclude=names))
    checkpoint = read_checkpoint(folder.latest)
    del checkpoint["clipfast"]
    torch.save(checkpoint, tmp_path / "theirs.pt")
    options = {"workers": 0, "epochs": 3}
    with pytest.raises(CheckpointError, match=f"--wd-exclude {' '.join(sorted(names))}"):
        train(config(shards, tmp_path / "other", **options), tmp_path / "theirs.pt")
    other, _ = train(config(shards, tmp_path / "other", wd_exclude=names, **options), tmp_path / "theirs.pt")
    assert [line["step"] for line in other.metrics() if "loss" in line] == [10, 12]


def test_a_recipe_or_a_checkpoint_imports_nothing(shards, tmp_path, capsys):
    """They may come from anybody, and to import a module runs it."""
    (tmp_path / "mine.toml").write_text(f'opt = "{IMPORTED}"\nmodel = "{TINY}"')
    options = ["--train-data", shards, "--logs", tmp_path, "--name", "run", "--batch-size", 8, "--epochs", 1]
    code, _, error = run_command(capsys, "train", "--recipe", tmp_path / "mine.toml", *options)
    assert code == 2
    assert f"imports {IMPORTED!r}: to use it, give --opt yourself" in error
    code, _, error = run_command(capsys, "train", "--model", TINY, "--opt", IMPORTED, *options)
    assert code == 0
    code, _, error = run_command(capsys, "train", "--resume", tmp_path / "run", "--epochs", 2)
    assert (code, "give --opt yourself" in error) == (2, True)
    assert run_command(capsys, "train", "--resume", tmp_path / "run", "--epochs", 2, "--opt", IMPORTED)[0] == 0


def test_flags(shards, tmp_path, capsys):
    flags = "--opt sgd --momentum 0.9 --opt-kwargs nesterov=True dampening=0 --wd-exclude *.bias visual.* --warmup 0.1"
    code, _, error = run_command(
        capsys, "train", "--train-data", shards, "--model", TINY, "--logs", tmp_path, "--name", "run", "--epochs", 1,
        "--batch-size", 8, *flags.split(),
    )  # fmt: skip
    assert code == 0, error
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "epoch_latest.pt")
    assert saved["clipfast"]["config"]["opt_kwargs"] == ["nesterov=True", "dampening=0"]
    assert saved["clipfast"]["config"]["wd_exclude"] == ["*.bias", "visual.*"]
    assert {group["nesterov"] for group in saved["optimizer"]["param_groups"]} == {True}


def test_muon_takes_no_closure():
    matrix, gain = (torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 4), (4,)))
    both = MuonAndAdamW(torch.optim.Muon([matrix]), torch.optim.AdamW([gain]))
    with pytest.raises(ValueError, match="takes no closure, got <function"):
        both.step(lambda: 0.0)
