"""The optimizer of a run: its class and arguments, its groups with learning rates and decays, and resumed runs."""

import pytest
import torch

from clipfast import get_model_config
from clipfast.checkpoints.checkpoint import CheckpointError, read_checkpoint
from clipfast.models import build
from clipfast.models.registry import read_model_config
from clipfast.train import TrainConfig
from clipfast.train.adamw import AdamW
from clipfast.train.optim import make_optimizer, parse_arguments
from clipfast.train.schedule import set_lr

from ..small_runs import TINY, cases


class Half(torch.optim.SGD):
    """An optimizer that halves its learning rate, in place of one from another package."""

    def __init__(self, params, lr=1.0, betas=(0.5, 0.6), weight_decay=0.0, **others):
        super().__init__(params, lr=lr / 2, weight_decay=weight_decay, **others)
        self.betas = betas


class Passing(torch.optim.AdamW):
    """An optimizer whose signature hides the arguments of AdamW, since it passes them on as keywords."""

    def __init__(self, params, lr=1e-3, **others):
        super().__init__(params, lr, **others)


class Reading(torch.optim.SGD):
    """An optimizer whose constructor reads the weights, and refuses a ``scale`` above 1."""

    def __init__(self, params, lr=1.0, weight_decay=0.0, scale=1.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        if scale > 1:
            raise RuntimeError("scale is too large")
        self.largest = max(weight.abs().max().item() for group in self.param_groups for weight in group["params"])


IMPORTED = f"{__name__}:Half"
BLOCK = "transformer.resblocks"


def built(name):
    """Build a model on the meta device, for the groups of its optimizer."""
    with torch.device("meta"):
        return build(read_model_config(TINY) if name == TINY else get_model_config(name))


@pytest.fixture(scope="module")
def model():
    """Return a tiny model on the meta device, for the groups of its optimizer."""
    return built(TINY)


def made(model, **options):
    """Make the optimizer of a model from training options."""
    return make_optimizer(TrainConfig(train_data="x.tar", **options), model)


def names_of(model, group):
    """Return the names of the parameters in a group of an optimizer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for parameter in group["params"]}


@pytest.mark.parametrize(
    ("options", "kind", "defaults"),
    [
        ("", "AdamW", "betas=(0.9,0.98) eps=1e-6 fused=True"),
        ("opt=adam", "Adam", "betas=(0.9,0.98) decoupled_weight_decay=False fused=True"),
        ("opt=nadamw", "NAdam", "decoupled_weight_decay=True eps=1e-6"),
        ("opt=sgd momentum=0.8 opt_kwargs=('nesterov=True',)", "SGD", "momentum=0.8 nesterov=True"),
        ("opt=adamw opt_kwargs=('betas=(0.1,0.2)',)", "AdamW", "betas=(0.1,0.2)"),
        ("opt=torch.optim:Adagrad eps=0.5", "Adagrad", "eps=0.5"),
        ("opt_kwargs=('foreach=TRUE','amsgrad=false')", "AdamW", "foreach=True amsgrad=False"),
        ("opt_kwargs=('fused=False',)", "AdamW", "fused=False"),
    ],
)
def test_classes_and_arguments(model, options, kind, defaults):
    optimizer = made(model, **parse_arguments(options.split()))
    assert type(optimizer).__name__ == kind
    assert isinstance(optimizer, getattr(torch.optim, kind))
    assert parse_arguments(defaults.split()).items() <= optimizer.defaults.items()


def test_adamw_computes_what_pytorchs_does_to_the_last_bit():
    """AdamW is bit-equal to PyTorch's, also in bfloat16, with AMSGrad, without a gradient, and after a skipped step."""
    torch.manual_seed(0)
    values = torch.randn(5, 3), torch.randn(4), torch.randn(6).bfloat16(), torch.randn(2)
    runs = []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(1)
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        groups = [
            {"params": parameters[:1], "weight_decay": 0.3, "lr": 0.1},
            {"params": parameters[1:], "amsgrad": True},
        ]
        optimizer, cleared = kind(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.0, fused=True), []
        for step in range(5):
            for parameter in parameters[: 3 + step]:
                parameter.grad = torch.randn_like(parameter)
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
            optimizer.zero_grad(set_to_none=step < 4)
            cleared.append([parameter.grad for parameter in parameters])
            optimizer.load_state_dict(optimizer.state_dict())
        runs.append((parameters, [optimizer.state[parameter] for parameter in parameters], cleared))
    torch.testing.assert_close(*runs, rtol=0, atol=0)
    assert [state["step"].item() for state in runs[0][1]] == [4, 4, 4, 3]


@pytest.mark.parametrize("opt", ["adamw", "stableadamw", "muon"])
def test_no_closure_may_be_given_as_none(model, opt):
    # Accelerate, and the distributed checkpoints of PyTorch, always pass the argument.
    optimizer = made(model, opt=opt)
    optimizer.step(closure=None)
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 1.0)


def test_resnets_have_betas_of_their_own():
    optimizer = made(built("RN50"), opt="adam")
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)


def test_an_import_path_keeps_the_defaults_of_its_class(model):
    optimizer = made(model, opt=IMPORTED)
    assert (type(optimizer).__name__, optimizer.betas) == ("Half", (0.5, 0.6))
    assert made(model, opt=IMPORTED, beta2=0.7).betas == (0.9, 0.7)
    passing = made(model, opt=f"{__name__}:Passing", beta2=0.7).defaults
    assert (passing["betas"], passing["eps"]) == ((0.9, 0.7), 1e-8)


@cases(r"""
opt=lion: --opt must be one of adadelta, adafactor, .* import path .*'lion'
opt=lbfgs: --opt must be one of
opt=optimizer: --opt must be one of
opt=lambda: --opt must be one of .*'lambda'
opt=no_such_package:X: --opt no_such_package:X cannot be imported
opt=torch.optim:None_: no attribute 'None_'
opt=os:system: --opt os:system is not a subclass of torch.optim.Optimizer
opt=sgd beta2=0.9: --opt sgd has no argument betas: leave out --beta1 and --beta2
opt=sgd eps=0.9: --opt sgd .* leave out --eps
opt=adamw momentum=0.9: --opt adamw .* leave out --momentum
opt=rprop: --opt rprop .* set --wd 0
opt=sgd cuda_graphs=True: --opt sgd .* leave out --cuda-graphs
opt=muon cuda_graphs=True: --opt muon cannot be captured in a graph
opt=nadam cuda_graphs=True: --opt nadam cannot be captured in a graph
cuda_graphs=True opt_kwargs=('fused=False',): --opt adamw cannot be captured in a graph
opt=adamw opt_kwargs=('beta=1',): --opt adamw does not take one of its options: .*'beta'
opt=muon opt_kwargs=('steps=1',): --opt muon does not take one of its options: .*'steps'
opt=adafactor eps=1e-8: --opt adafactor does not take one of its options: .*eps=1e-08
opt_kwargs=('foreach=True','fused=True'): does not take one of its options: .*fused.*foreach=True, fu
opt=sgd opt_kwargs=('nesterov=true',): does not take one of its options: Nesterov momentum .*=Tr
opt_kwargs=('lr=0.1',): --opt-kwargs must not set lr: use --lr
opt=muon opt_kwargs=('weight_decay=1',): --opt-kwargs must not set weight_decay: use --wd
opt_kwargs=('amsgrad',): --opt-kwargs must be name=value, got 'amsgrad'
opt_kwargs=('=1',): --opt-kwargs must be name=value, got '=1'
wd_exclude=('*.bias','positional'): --wd-exclude 'positional' is the name of no parameter
image_layer_decay=0.0: --image-layer-decay must be more than 0, got 0.0
text_layer_decay=1.5: --text-layer-decay must be at most 1, got 1.5
""")
def test_what_cannot_work(model, options, said):
    with pytest.raises(ValueError, match=said):
        made(model, **options)


def test_one_that_reads_the_weights_is_made_where_they_are(model):
    name = f"{__name__}:Reading"
    with pytest.raises(NotImplementedError, match=r"test_optimizers:Reading reads .*Tensor\.item"):
        made(model, opt=name)
    assert made(build(read_model_config(TINY)), opt=name).largest > 0
    with pytest.raises(ValueError, match=r"Reading .*: scale is too large; .* scale=2\b"):
        made(model, opt=name, opt_kwargs=("scale=2",))


def by_name(model, optimizer, key):
    """Return the optimizer's setting ``key`` for each parameter, by the parameter's name."""
    return {name: group[key] for group in optimizer.param_groups for name in names_of(model, group)}


def test_weight_decay_leaves_out_what_patterns_name(model):
    gains = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    moved = {"positional_embedding", "visual.positional_embedding", "visual.proj"}
    for exclude, without in ((None, gains), (("*positional_embedding", "visual.proj"), gains | moved)):
        optimizer = made(model, wd=0.3, wd_exclude=exclude or ())
        found = by_name(model, optimizer, "weight_decay")
        assert found == {name: 0.0 if name in without else 0.3 for name, _ in model.named_parameters()}
        assert "lr_scale" not in optimizer.param_groups[0]


# The number of layers between a parameter and its tower's output, by the beginning of the parameter's name.
VIT = {
    "visual.transformer.resblocks.0": 2, "visual.transformer.resblocks.1": 1, "visual.ln_post": 1, "visual.proj": 0,
    "visual.": 3,
}  # fmt: skip
TEXT = {
    "token_embedding": 3, "positional_embedding": 3, "transformer.resblocks.0": 2, "transformer.resblocks.1": 1,
    "ln_final": 1, "text_projection": 0,
}  # fmt: skip
RESNET = {
    "visual.layer1": 4, "visual.layer2": 3, "visual.layer3": 2, "visual.layer4": 1, "visual.attnpool": 0, "visual.": 5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "depths"),
    [
        (TINY, "text_layer_decay=0.5", TEXT),
        (TINY, "image_layer_decay=0.5 text_layer_decay=0.5", VIT | TEXT),
        ("RN50", "image_layer_decay=0.5", RESNET),
    ],
)
def test_rates_fall_from_layer_to_layer(name, options, depths):
    model = built(name)
    optimizer = made(model, lr=0.1, **parse_arguments(options.split()))
    parameters = dict(model.named_parameters())
    expected = {
        name: 0.5 ** next((depth for start, depth in depths.items() if name.startswith(start)), 0)
        for name in parameters
    }
    assert by_name(model, optimizer, "lr_scale") == expected
    rates = {name: 0.1 * scale for name, scale in expected.items()}
    assert by_name(model, optimizer, "lr") == pytest.approx(rates)
    decays = by_name(model, optimizer, "weight_decay")
    assert all((decays[name] == 0) == (parameter.ndim < 2) for name, parameter in parameters.items())


def test_rates_of_a_graph_are_tensors_of_their_own():
    optimizer = made(build(read_model_config(TINY)), cuda_graphs=True, image_layer_decay=0.5, lr=1.0)
    rates = [(group["lr"], group["lr_scale"]) for group in optimizer.param_groups]
    set_lr(optimizer, 2.0)
    assert all(rate.item() == 2 * scale for rate, scale in rates)  # set_lr changes each learning rate's tensor in place
    assert len({rate.item() for rate, _ in rates}) == 4


def test_muon_takes_matrices_and_adamw_the_rest(model):
    optimizer = made(model, opt="muon", momentum=0.9, opt_kwargs=("ns_steps=3",), image_layer_decay=0.5)
    muon, adamw = optimizer.parts
    assert {"momentum": 0.9, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"}.items() <= muon.defaults.items()
    tables = {"token_embedding.weight", "positional_embedding", "visual.positional_embedding"}
    parameters = dict(model.named_parameters())
    matrices = {name for name in parameters if parameters[name].ndim == 2} - tables
    assert by_name(model, muon, "lr").keys() == matrices
    assert by_name(model, adamw, "lr").keys() == parameters.keys() - matrices
    set_lr(optimizer, 1.0)
    assert {group["lr"] for group in muon.param_groups} == {0.25, 0.5, 1.0}


@pytest.fixture
def as_theirs(tmp_path):
    """Return a function that writes a training checkpoint without clipfast's own entry, as OpenCLIP's trainer does."""

    def write(folder):
        """Write a run's latest checkpoint as OpenCLIP's trainer would, and return its path."""
        checkpoint = read_checkpoint(folder.latest)
        del checkpoint["clipfast"]
        torch.save(checkpoint, tmp_path / "theirs.pt")
        return tmp_path / "theirs.pt"

    return write


def test_another_optimizer_cannot_go_on(run_small, as_theirs, tmp_path):
    def refused(said, checkpoint, name="run", **options):
        """Assert that the state of the optimizer in a checkpoint is refused by a run with these options."""
        with pytest.raises(CheckpointError, match=said):
            run_small(checkpoint, name, epochs=3, **options)

    own = {"wd_exclude": (f"{BLOCK}.0.mlp.c_fc.weight",)}
    folder = run_small(workers=0, **own)
    before = folder.latest.read_bytes()
    refused("optimizer state of --opt adamw, and this run has --opt adam: leave", folder.latest, opt="adam")
    refused("must stay: locked towers", folder.latest, lock_text=True)
    refused("must stay: .*--wd-exclude", folder.latest, wd_exclude=("visual.proj",))
    refused("does not fit the model: .*--image-layer-decay", folder.latest, image_layer_decay=0.5)
    refused("does not fit the model: it has no max_exp_avg_sq", folder.latest, opt_kwargs=("amsgrad=True",), **own)
    # this pattern names another parameter of the same shape, so the optimizer's groups keep their size
    refused("its groups hold other parameters", folder.latest, wd_exclude=(f"{BLOCK}.1.mlp.c_fc.weight",))
    assert folder.latest.read_bytes() == before
    # A checkpoint of OpenCLIP has the state of AdamW, and does not name the parameters in its groups. Only the shapes
    # of the moments can be compared.
    theirs = as_theirs(folder)
    refused("optimizer state of --opt adamw, and this run has --opt sgd", theirs, "other", opt="sgd")
    refused("its moments have other shapes", theirs, "other", wd_exclude=("text_projection",))
    assert not (tmp_path / "other").exists()


@pytest.mark.long
def test_a_checkpoint_of_open_clip_main_goes_on(run_small, as_theirs):
    """OpenCLIP's main branch has the optimizer groups of 3.3.0, but position and class embeddings do not decay."""
    names = ("positional_embedding", "visual.positional_embedding", "visual.class_embedding")
    theirs = as_theirs(run_small(workers=0, wd_exclude=names))
    options = {"workers": 0, "epochs": 3}
    with pytest.raises(CheckpointError, match=f"--wd-exclude {' '.join(sorted(names))}"):
        run_small(theirs, "other", **options)
    other = run_small(theirs, "other", wd_exclude=names, **options)
    assert [line["step"] for line in other.metrics() if "loss" in line] == [10, 12]
