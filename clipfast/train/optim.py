"""The optimizer of a run: its parameter groups, their learning rates and their weight decay."""

import ast
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..distributed.dtensors import is_dtensor
from ..models import CLIP
from ..models.freezing import Group as Layers
from ..models.freezing import groups_of_text, parameters_of
from .adamw import AdamW, refuse_closure
from .stable_adamw import StableAdamW
from .train_config import TrainConfig

MUON = "muon"
TIMM = "timm/"  # OpenCLIP's prefix for names of timm's optimizers
# Classes that cannot be chosen: the abstract base, LBFGS, whose step needs a closure that computes the loss, and
# SparseAdam, which needs sparse gradients.
_UNFIT = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
_FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
_FUSED_FOR_DTENSORS = (torch.optim.AdamW, torch.optim.Adam)  # PyTorch has no fused SGD for DTensors
Group = dict[str, Any]


def adamw(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    *,
    capturable: bool = False,
) -> AdamW:
    """Return AdamW (Loshchilov and Hutter 2019) for the parameters of ``model`` that are trained.

    Gains, biases and scalars have no weight decay. With ``capturable``, a step can be captured in a CUDA graph.
    """
    groups = parameter_groups(model, weight_decay)
    _set_rates(groups, lr, capturable=capturable)
    return AdamW(groups, betas=betas, eps=eps, fused=True, capturable=capturable)


def make_optimizer(config: TrainConfig, model: CLIP) -> torch.optim.Optimizer:
    """Return the optimizer of a training run; defaults of its options depend on the image tower, as in OpenCLIP.

    Raises:
        ValueError: there is no such optimizer, or it does not take one of the options.
    """
    groups = parameter_groups(model, config.wd, config.wd_exclude, layer_scales(model, config))
    _set_rates(groups, config.lr, capturable=config.cuda_graphs)
    if config.opt.lower() == MUON:
        return _make_muon(config, model, groups)
    kind, options = optimizer_class(config.opt)
    optimizer = _construct(config, kind, groups, options | _options(config, kind, model))
    if config.cuda_graphs and not takes_verdict(optimizer):
        raise ValueError(
            f"--opt {config.opt} cannot be captured in a graph: the host must tell it to skip a step whose gradient is "
            "not finite; use fused adam or adamw, or leave out --cuda-graphs"
        )
    return optimizer


def _construct(
    config: TrainConfig, kind: type[torch.optim.Optimizer], groups: list[Group], options: dict[str, Any]
) -> torch.optim.Optimizer:
    """Construct the optimizer of a training run with ``options`` and the arguments of ``--opt-kwargs``.

    Raises:
        ValueError: the optimizer does not take one of these arguments.
        NotImplementedError: the parameters are on the "meta" device, and the constructor reads their values.
    """
    given = parse_arguments(config.opt_kwargs)
    has_dtensors = any(is_dtensor(parameter) for group in groups for parameter in group["params"])
    fused = _FUSED_FOR_DTENSORS if has_dtensors else _FUSED
    if kind in fused and given.keys().isdisjoint(("foreach", "fused", "differentiable")):
        options |= {"fused": True}
        if kind is torch.optim.AdamW and not has_dtensors:
            kind = AdamW
    options |= given
    try:
        return kind(groups, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "meta" in str(error):  # PyTorch raises a RuntimeError that names "meta"
            raise NotImplementedError(f"--opt {config.opt} reads the values of parameters: {error}") from error
        shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ValueError(
            f"--opt {config.opt} does not take one of its options: {error}; they are {shown}: correct the flag that "
            "sets it, or --opt-kwargs"
        ) from error


def takes_verdict(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if the optimizer reads the tensor ``found_inf`` on the device, and skips the step if it is 1.

    Fused SGD reads ``found_inf`` too, but it is left out: if its first step is skipped, its momentum is uninitialized.
    """
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and bool(optimizer.defaults.get("fused"))


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    exclude: Sequence[str] = (),
    scales: Mapping[nn.Parameter, float] | None = None,
) -> list[Group]:
    """Return the trained parameters in groups for the optimizer, by weight decay and by factor on the learning rate.

    Args:
        model: the model.
        weight_decay: weight decay of all parameters but gains, biases and scalars.
        exclude: patterns of names of more parameters without weight decay.
        scales: factor on the learning rate of each parameter, which its group holds as ``lr_scale``; 1 for parameters
            that are not in ``scales``. Without ``scales`` the groups have no ``lr_scale``.

    Raises:
        ValueError: a pattern fits no parameter.
    """
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name, _ in model.named_parameters()):
            raise ValueError(f"--wd-exclude {pattern!r} is the name of no parameter: '*' stands for any part of a name")
    buckets: dict[tuple[float, bool], Group] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not any(fnmatchcase(name, pattern) for pattern in exclude)
            scale = 1.0 if scales is None else scales.get(parameter, 1.0)
            group: Group = {"params": [], "weight_decay": weight_decay if decays else 0.0}
            if scales is not None:
                group["lr_scale"] = scale
            buckets.setdefault((-scale, decays), group)["params"].append(parameter)
    return [buckets[key] for key in sorted(buckets)]


def layer_scales(model: CLIP, config: TrainConfig) -> dict[nn.Parameter, float] | None:
    """Return the factor on the learning rate of each parameter by ``--image-layer-decay`` and ``--text-layer-decay``.

    The projection has the factor 1. From there down to the embedding, the factor of each layer is the factor of the
    layer after it, times the decay of the tower. The result is None if there is no decay.
    """
    towers: list[tuple[list[Layers], float | None]]
    towers = [
        (model.visual.layer_groups(), config.image_layer_decay),
        (groups_of_text(model), config.text_layer_decay),
    ]
    if all(decay is None for _, decay in towers):
        return None
    return {
        parameter: decay**depth
        for layers, decay in towers
        if decay is not None
        for depth, group in enumerate(reversed(layers))
        for parameter in parameters_of(group)
    }


def optimizer_class(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the optimizer class that ``--opt`` names, and the options that the name implies.

    Raises:
        ValueError: there is no class of this name, or training cannot use it.
    """
    if name.lower() == "nadamw":  # timm's and OpenCLIP's name for NAdam with decoupled weight decay
        return torch.optim.NAdam, {"decoupled_weight_decay": True}
    if name.startswith(TIMM):
        return _timm_optimizer(name)
    if ":" in name:
        try:
            found = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--opt {name} cannot be imported: {error}") from error
        if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
            raise ValueError(f"--opt {name} is not a subclass of torch.optim.Optimizer")
        return found, {}
    known = {word.lower(): kind for word, kind in vars(torch.optim).items() if _is_fit(kind)}
    known["stableadamw"] = StableAdamW
    if name.lower() not in known:
        raise ValueError(
            f"--opt must be one of {', '.join(sorted({*known, 'nadamw'}))}, or an import path such as "
            f"timm.optim:Lamb, or timm/lamb, got {name!r}"
        )
    return known[name.lower()], {}


def _timm_optimizer(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the optimizer class that timm has under ``name``, and the options that the name implies.

    Raises:
        ValueError: timm has none of this name.
    """
    import timm.optim

    timm_optim: Any = timm.optim  # timm does not declare these names as exported
    known = timm_optim.list_optimizers()
    if name.removeprefix(TIMM) not in known:
        raise ValueError(f"--opt {name}: timm knows {', '.join(known)}")
    found = timm_optim.get_optimizer_info(name.removeprefix(TIMM))
    return found.opt_class, dict(found.defaults or {})


def _is_fit(kind: object) -> bool:
    """Return True for an optimizer class of PyTorch that training can use."""
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind not in _UNFIT


def _options(config: TrainConfig, kind: type[torch.optim.Optimizer], model: CLIP) -> dict[str, Any]:
    """Return the arguments of the optimizer that flags of their own set, such as ``--momentum``.

    Raises:
        ValueError: an option was given that the optimizer does not have.
    """
    known = inspect.signature(kind).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    betas, eps = adam_defaults(config, model)
    # Optimizers of other packages keep their own betas and eps; PyTorch's optimizers and StableAdamW get CLIP's.
    has_ours = "betas" in known and (kind is StableAdamW or kind.__module__.startswith("torch.optim."))
    options: dict[str, Any] = {}
    for flag, argument, value, is_given in (
        ("--beta1 and --beta2", "betas", betas, config.beta1 != 0.9 or config.beta2 is not None),
        ("--eps", "eps", eps, config.eps is not None),
        ("--momentum", "momentum", config.momentum, config.momentum is not None),
        ("--wd", "weight_decay", None, config.wd > 0),  # the parameter groups hold its value
        ("--cuda-graphs", "capturable", True, config.cuda_graphs),
    ):
        if is_given and argument not in known and not takes_any:
            without = "set --wd 0" if argument == "weight_decay" else f"leave out {flag}"
            raise ValueError(f"--opt {config.opt} has no argument {argument}: {without}")
        if value is not None and (is_given or (has_ours and argument in ("betas", "eps"))):
            options[argument] = value
    return options


def adam_defaults(config: TrainConfig, model: CLIP) -> tuple[tuple[float, float], float]:
    """Return Adam's betas and epsilon. Values that are not given depend on the image tower, as in OpenCLIP."""
    is_vit = isinstance(model.config.vision.layers, int)
    return (config.beta1, config.beta2 or (0.98 if is_vit else 0.999)), config.eps or (1e-6 if is_vit else 1e-8)


def parse_arguments(words: Iterable[str]) -> dict[str, Any]:
    """Parse the words of ``--opt-kwargs``, such as ``nesterov=True``. A value that is no Python literal is a string.

    The words true, false and none may be written in any case.
    """
    arguments: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            arguments[name] = ast.literal_eval(text.title() if text.lower() in ("true", "false", "none") else text)
        except (ValueError, SyntaxError):
            arguments[name] = text
    return arguments


def _set_rates(groups: list[Group], lr: float, *, capturable: bool) -> None:
    """Set the learning rate of each optimizer group: a number, or a tensor if the step is captured in a CUDA graph.

    A replay of the graph reads the tensor again, but would use a number as it was at the capture.
    """
    for group in groups:
        rate = lr * group.get("lr_scale", 1.0)
        group["lr"] = torch.tensor(rate, device=group["params"][0].device) if capturable else rate


def _make_muon(config: TrainConfig, model: CLIP, groups: list[Group]) -> "MuonAndAdamW":
    """Return Muon for the matrices of ``groups`` that are no embeddings, combined with AdamW for the other parameters.

    Raises:
        ValueError: this PyTorch has no Muon, no matrix is trained, or steps are to be captured in a CUDA graph.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"--opt muon needs a newer PyTorch than {torch.__version__}: torch.optim.Muon is missing")
    if config.cuda_graphs:
        raise ValueError("--opt muon cannot be captured in a graph: leave out --cuda-graphs")
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    tables |= {parameter for name, parameter in model.named_parameters() if name in model.no_weight_decay()}

    def part(*, of_matrices: bool) -> list[Group]:
        """Return the groups of parameters for one of the two optimizers: matrices for Muon, or all others for AdamW."""
        split = [
            group | {"params": [x for x in group["params"] if (x.ndim == 2 and x not in tables) == of_matrices]}
            for group in groups
        ]
        return [group for group in split if group["params"]]

    matrices, rest = part(of_matrices=True), part(of_matrices=False)
    if not matrices:
        raise ValueError("--opt muon trains matrices, and all of them are locked")
    # "match_rms_adamw" scales Muon's updates to the size of AdamW's, so that the same --lr and --wd suit both.
    options: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw"}
    if config.momentum is not None:
        options["momentum"] = config.momentum
    betas, eps = adam_defaults(config, model)
    muon = _construct(config, torch.optim.Muon, matrices, options)
    return MuonAndAdamW(muon, torch.optim.AdamW(rest, betas=betas, eps=eps, fused=True))


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer, with the parameter groups and the state of both."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.parts = (first, second)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let Muon and AdamW use the parameter groups and the state of this combined optimizer."""
        first, second = self.parts
        first.state = second.state = self.state
        count = len(first.param_groups)
        first.param_groups, second.param_groups = self.param_groups[:count], self.param_groups[count:]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Run the step of both optimizers, Muon and AdamW; a closure is refused."""
        refuse_closure(self, closure)
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both optimizers, Muon and AdamW, from the result of ``state_dict``."""
        super().load_state_dict(state_dict)
        self._share()
