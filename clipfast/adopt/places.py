"""The record of what was replaced in somebody else's model, and how it is taken back.

A method of one module is replaced by an attribute of the same name in that instance, and taken back by deleting it.
The class, the parameters, the buffers, the children and the hooks of the module stay what they are, and ``__call__``
runs the hooks around the new ``forward``. A replacement reads weights and children from its module at each call, so
that whatever is moved, loaded, locked or wrapped later counts.
"""

import copy
import dataclasses
import inspect
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.launch import triton_runs_on
from ..models.layers import has_hooks

# Attributes of a model: the list of its places; and of a text tower: the mask that was last looked at, and the verdict.
RECORD, SEEN = "_clipfast_places", "_clipfast_mask"
# On a CPU a pass that ours save costs less than calling them, as timings of single steps have shown. Only what
# :func:`on_cpus` marks is faster there; everything else is for GPUs, and for float64, in which tests compare both.
CPU_DTYPES: tuple[torch.dtype, ...] = (torch.float64,)
ON_GPUS = " (on a CPU as before)"


def on_cpus(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that is faster than the original on a CPU too, or that asks :func:`is_left` itself."""
    function.on_cpus = True  # type: ignore[attr-defined]
    return function


def is_left(x: Tensor) -> bool:
    """Return True if the original is faster where ``x`` is: on a CPU."""
    return x.device.type == "cpu" and x.dtype not in CPU_DTYPES and not triton_runs_on(x.device)


class Replacement:
    """A method of one module, which calls ``function(module, ...)``.

    It is pickled and copied together with its module. (Python would unpickle a bound method as the module's own
    ``forward``.) It does not keep its module alive, which holds it: a model is freed as soon as nobody refers to it.

    Args:
        function: a function of a module of this package; its first argument is the module.
        module: the module whose method it replaces.
        method: the name of that method.
        owner: the module that holds the mask of ``module``'s attention. ``function`` gets it as the argument ``owner``.
        options: switches that ``function`` gets besides.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        method: str = "forward",
        owner: nn.Module | None = None,
        options: Mapping[str, bool] | None = None,
    ) -> None:
        self.function, self.method, self.options = function, method, dict(options or {})
        self.module, self.owner = module, owner
        self.is_off = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of ``function``, or of the class's own method where the original is to run."""
        if args and args[0] is self.module:  # accelerate takes it for a function, and binds it when it unwraps a model
            args = args[1:]
        if self.is_off or self._is_left((*args, *kwargs.values())):
            return self.original(*args, **kwargs)
        if self.owner is None:
            return self.function(self.module, *args, **kwargs, **self.options)
        return self.function(self.module, *args, owner=self.owner, **kwargs, **self.options)

    @property
    def module(self) -> nn.Module:
        """The module whose method it replaces."""
        module = self._module()
        if module is None:
            raise ReferenceError(f"the module of this {self.method} is gone: keep a reference to the model that has it")
        return module

    @module.setter
    def module(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def owner(self) -> nn.Module | None:
        """The module that holds the mask; None if there is none, or if it is gone."""
        return None if self._owner is None else self._owner()

    @owner.setter
    def owner(self, owner: nn.Module | None) -> None:
        self._owner = None if owner is None else weakref.ref(owner)

    @property
    def __globals__(self) -> dict[str, Any]:
        # torch.jit.script asks for them, and shows this error.
        raise AttributeError(
            f"torch.jit.script cannot compile a {type(self.module).__name__} that runs on clipfast: call "
            "clipfast.revert_model(model) before"
        )

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_module", "_owner")}
        return kept | {"module": self.module, "owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _is_left(self, values: tuple[Any, ...]) -> bool:
        """Return True if the original is faster here, or if torch.fx traces, which can follow the original only."""
        for value in values:
            if isinstance(value, torch.fx.Proxy):
                return True
            if isinstance(value, Tensor) and not hasattr(self.function, "on_cpus"):
                return is_left(value)
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Replacement":
        # The owner is outside the module. If only the module is copied, the copy keeps the owner that it has.
        owner = memo.get(id(self.owner), self.owner)
        new = Replacement(self.function, copy.deepcopy(self.module, memo), self.method, owner, self.options)
        new.is_off = self.is_off
        return new

    @property
    def original(self) -> Callable[..., Any]:
        """The method of the class."""
        return getattr(type(self.module), self.method).__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        # transformers' Trainer drops every column of the data that the model's forward has no argument for.
        return inspect.signature(self.original)


@dataclasses.dataclass(frozen=True)
class Place:
    """A module that could run on kernels of this package.

    Attributes:
        module: its name in the model.
        kind: the argument of ``apply_to_...`` that it belongs to.
        method: the name of the method that was replaced; None if the place was left alone.
        text: what it runs on, or why it was left alone.
    """

    module: str
    kind: str
    method: str | None
    text: str


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A proposal for a place: a function for one of its methods, or nothing if there is none."""

    kind: str
    text: str
    function: Callable[..., Any] | None = None
    method: str = "forward"
    owner: nn.Module | None = None
    option: str | None = None  # an argument of ``function`` that is then True


def propose_unless(
    refusal: str,
    kind: str,
    text: str,
    function: Callable[..., Any],
    method: str = "forward",
    option: str | None = None,
) -> Proposal:
    """Return the proposal of a function, or of nothing if there is a reason to refuse it."""
    return Proposal(kind, refusal) if refusal else Proposal(kind, text, function, method, option=option)


def carry_out(module: nn.Module, name: str, proposal: Proposal, wanted: bool) -> Place:
    """Replace the method that ``proposal`` names, if that is wanted and possible, and return the resulting place."""
    kind, method = proposal.kind, proposal.method
    if not wanted:
        return Place(name, kind, None, f"{kind}=False")
    if proposal.function is None:
        return Place(name, kind, None, proposal.text)
    unknown = _unknown_arguments(module, method, proposal.function)
    if unknown:
        return Place(name, kind, None, f"in this version of its library, its {method} takes {', '.join(unknown)} too")
    there = _unwrapped(module.__dict__.get(method))
    options = {proposal.option: True} if proposal.option else {}
    if there is None:
        module.__dict__[method] = Replacement(proposal.function, module, method, proposal.owner, options)
    elif not isinstance(there, Replacement):
        return Place(name, kind, None, f"something else has replaced its {method}")
    elif there.is_off:  # in a wrapper that has outlived ``revert_model``
        there.function, there.owner, there.options, there.is_off = proposal.function, proposal.owner, options, False
    else:  # a second proposal for the same method
        there.options |= options
    return Place(name, kind, method, proposal.text + ("" if hasattr(proposal.function, "on_cpus") else ON_GPUS))


def _unknown_arguments(module: nn.Module, method: str, function: Callable[..., Any]) -> list[str]:
    """Return the names of arguments of a method that ``function`` does not have. The first is given by position."""
    theirs = list(inspect.signature(getattr(type(module), method)).parameters)[2:]
    return [name for name in theirs if name not in inspect.signature(function).parameters]


def revert_model(model: nn.Module) -> nn.Module:
    """Take back everything that ``apply_to_open_clip``, ``apply_to_hf`` and ``apply_to_timm`` did to ``model``.

    Afterwards every module has the attributes and methods that it had before; weights are what training has made of
    them. A part of a model, a copy and an unpickled model can be reverted too, and a model to which nothing was applied
    stays as it is.

    Args:
        model: any module. A wrapper, such as ``DistributedDataParallel`` or a compiled model, is looked into.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module("revert_model", model)
    for module in model.modules():
        state = module.__dict__
        for name, value in list(state.items()):
            replacement = _unwrapped(value)
            if not isinstance(replacement, Replacement):
                continue
            # A wrapper such as accelerate's may still hold this replacement, and call it: from now on it calls the
            # class's own method.
            replacement.is_off = True
            if value is replacement and name == replacement.method:
                del state[name]
        for key in (RECORD, SEEN):
            state.pop(key, None)
    return model


def check_module(function: str, model: object) -> None:
    """Refuse anything but a module, with a TypeError."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def class_name(module: nn.Module) -> str:
    """Return the full name of the class, by which classes are recognised without importing their libraries."""
    kind, base = type(module), type(module).__bases__[-1]
    if kind.__name__ == f"FSDP{base.__name__}":  # FSDP2 makes a class of FSDPModule and the class that it was
        kind = base
    return f"{kind.__module__}.{kind.__qualname__}"


def runs_ours(module: nn.Module, method: str = "forward") -> bool:
    """Return True if a method of ``module`` is replaced by ours."""
    return isinstance(module.__dict__.get(method), Replacement)


def reaches_ours(module: nn.Module, method: str = "forward") -> bool:
    """Return True if a method of ``module`` is replaced by ours, or by a wrapper of ours such as accelerate's."""
    return isinstance(_unwrapped(module.__dict__.get(method)), Replacement)


def _unwrapped(value: Any) -> Any:
    """Return the innermost function of bound methods and of wrappers with ``__wrapped__``."""
    while isinstance(value, types.MethodType) or (callable(value) and hasattr(value, "__wrapped__")):
        value = value.__func__ if isinstance(value, types.MethodType) else value.__wrapped__
    return value


def is_untouched(module: nn.Module) -> bool:
    """Return True if calling ``module`` runs its class's ``forward`` or our replacement, and no hook."""
    return not has_hooks(module) and ("forward" not in module.__dict__ or runs_ours(module))


def computes(x: Tensor) -> bool:
    """Return True if our ops take ``x`` where it is: float64 is for CPUs only, and a traced graph cannot hold them."""
    if x.is_nested or torch._C._get_tracing_state() is not None:
        return False
    return x.device.type == "cpu" or (x.device.type == "cuda" and x.dtype != torch.float64)
