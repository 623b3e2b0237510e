"""Replaces methods of modules in another library's model, records the replacements, and reverts them.

A method of one module is replaced by an attribute of the same name in that instance, and restored by deleting it.
Class, parameters, buffers, children and hooks of the module are unchanged, and ``__call__`` runs the hooks around the
new ``forward``. A replacement reads weights and children from its module at each call: later moves, loads, freezing and
wrapping of them take effect.
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
from ..kernels.packing import Packing
from ..models.layers import PackedTokens, has_hooks

# The attributes that hold a patched model's list of replacements, and a text tower's last checked mask with the result.
RECORD, SEEN = "_clipfast_places", "_clipfast_mask"
# On a CPU, most fused ops are slower than the original, as timings of single steps have shown. Only functions with the
# mark :func:`on_cpus` are faster; all others run on GPUs, and in float64, in which tests compare them with the
# original.
CPU_DTYPES: tuple[torch.dtype, ...] = (torch.float64,)
ON_GPUS = " (on a CPU as before)"


def on_cpus(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a replacement that is faster than the original on a CPU too, or that calls :func:`is_left` itself."""
    function.on_cpus = True  # type: ignore[attr-defined]
    return function


def is_left(x: Tensor) -> bool:
    """Return True if a replaced method should run the original for ``x``, which is faster on a CPU."""
    return x.device.type == "cpu" and x.dtype not in CPU_DTYPES and not triton_runs_on(x.device)


class Replacement:
    """The replaced method of one module of an adopted model: it calls ``function(module, ...)``.

    It is pickled and copied together with its module. (Python would unpickle a bound method as the module's own
    ``forward``.) Its reference to the module is weak: a model is freed as soon as nothing else refers to it.

    Args:
        function: a function of a module of this package; its first argument is the module.
        module: the module whose method it replaces.
        method: the name of that method.
        owner: the module that holds the mask of ``module``'s attention. ``function`` gets it as the argument ``owner``.
        options: further arguments of ``function``.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        method: str = "forward",
        owner: nn.Module | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.function, self.method, self.options = function, method, dict(options or {})
        self.module, self.owner = module, owner
        self.is_off = self.is_always_ours = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``function``, or the class's own method if the original is to run."""
        if args and args[0] is self.module:  # accelerate binds this object like a function when it unwraps a model
            args = args[1:]
        if self.is_off or (not self.is_always_ours and self._is_left((*args, *kwargs.values()))):
            return self.original(*args, **kwargs)
        if self.owner is None:
            return self.function(self.module, *args, **kwargs, **self.options)
        return self.function(self.module, *args, owner=self.owner, **kwargs, **self.options)

    @property
    def module(self) -> nn.Module:
        """The module whose method is replaced."""
        module = self._module()
        if module is None:
            raise ReferenceError(f"the module of this {self.method} is gone: keep a reference to the model that has it")
        return module

    @module.setter
    def module(self, module: nn.Module) -> None:
        """Set the module of an adopted model whose method is replaced."""
        self._module = weakref.ref(module)

    @property
    def owner(self) -> nn.Module | None:
        """The module that holds the mask of the replaced attention; None without a mask, or if it was freed."""
        return None if self._owner is None else self._owner()

    @owner.setter
    def owner(self, owner: nn.Module | None) -> None:
        """Set the module that holds the mask of the replaced attention."""
        self._owner = None if owner is None else weakref.ref(owner)

    @property
    def __globals__(self) -> dict[str, Any]:
        # torch.jit.script reads the attribute __globals__, and shows the error below.
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
        """Return True if a replaced method's original is faster here, or alone can be traced by torch.fx."""
        classes = [value.__class__ for value in values]
        if Packing in classes or PackedTokens in classes:  # only our functions know packed tokens
            return False
        for value in values:
            if isinstance(value, torch.fx.Proxy):
                return True
            if isinstance(value, Tensor) and not hasattr(self.function, "on_cpus"):
                return is_left(value)
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Replacement":
        # The owner is outside the module. If only the module is copied, the copy keeps the original owner.
        owner = memo.get(id(self.owner), self.owner)
        new = Replacement(self.function, copy.deepcopy(self.module, memo), self.method, owner, self.options)
        new.is_off, new.is_always_ours = self.is_off, self.is_always_ours
        return new

    @property
    def original(self) -> Callable[..., Any]:
        """The class's own method, which was replaced."""
        return getattr(type(self.module), self.method).__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        # transformers' Trainer drops every column of the data that the model's forward has no argument for.
        return inspect.signature(self.original)


@dataclasses.dataclass(frozen=True)
class Place:
    """A module for which a replacement was proposed.

    Attributes:
        module: its name in the model.
        kind: the argument of ``apply_to_...`` that switches its replacement on.
        method: the name of the method that was replaced; None if none was.
        text: the kernel on which the module runs, or the reason why no method was replaced.
    """

    module: str
    kind: str
    method: str | None
    text: str


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A proposed replacement of one method of a module, or the reason why there is none."""

    kind: str
    text: str
    function: Callable[..., Any] | None = None
    method: str = "forward"
    owner: nn.Module | None = None
    option: str | None = None  # the name of an argument of ``function`` that this proposal sets to ``value``
    value: Any = True


def propose_unless(
    refusal: str,
    kind: str,
    text: str,
    function: Callable[..., Any],
    method: str = "forward",
    option: str | None = None,
) -> Proposal:
    """Propose a function as a replacement, unless there is a reason to refuse it."""
    return Proposal(kind, refusal) if refusal else Proposal(kind, text, function, method, option=option)


def carry_out(module: nn.Module, name: str, proposal: Proposal, wanted: bool) -> Place:
    """Replace a module's method as proposed, if it is wanted and possible; return a record of this or of the reason."""
    kind, method = proposal.kind, proposal.method
    if not wanted:
        return Place(name, kind, None, f"{kind}=False")
    if proposal.function is None:
        return Place(name, kind, None, proposal.text)
    unknown = _unknown_arguments(module, method, proposal.function)
    if unknown:
        return Place(name, kind, None, f"in this version of its library, its {method} takes {', '.join(unknown)} too")
    there = _unwrapped(module.__dict__.get(method))
    options = {proposal.option: proposal.value} if proposal.option else {}
    if there is None:
        module.__dict__[method] = Replacement(proposal.function, module, method, proposal.owner, options)
    elif not isinstance(there, Replacement):
        return Place(name, kind, None, f"something else has replaced its {method}")
    elif there.is_off:  # a wrapper still holds a replacement from before ``revert_model``
        there.function, there.owner, there.options = proposal.function, proposal.owner, options
        there.is_off = there.is_always_ours = False
    else:  # our replacement is there already, and gets a further option
        there.options |= options
    runs_everywhere = hasattr(proposal.function, "on_cpus") or kind == "fp8"
    return Place(name, kind, method, proposal.text + ("" if runs_everywhere else ON_GPUS))


def _unknown_arguments(module: nn.Module, method: str, function: Callable[..., Any]) -> list[str]:
    """Return the arguments of a method, after the first, whose names its replacement ``function`` does not have."""
    theirs = list(inspect.signature(getattr(type(module), method)).parameters)[2:]
    return [name for name in theirs if name not in inspect.signature(function).parameters]


def revert_model(model: nn.Module) -> nn.Module:
    """Revert all replacements that ``apply_to_open_clip``, ``apply_to_hf`` and ``apply_to_timm`` made in ``model``.

    Afterwards every module has its former attributes and methods; weights keep their current values. A part of a model,
    a copy and an unpickled model can be reverted too, and a model without replacements is not changed.

    Args:
        model: any module, also a wrapper such as ``DistributedDataParallel`` or a compiled model.

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
    """Refuse to adopt a model that is not an ``nn.Module``, with a TypeError."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class, by which it is recognised without importing its library."""
    kind, base = type(module), type(module).__bases__[-1]
    if kind.__name__ == f"FSDP{base.__name__}":  # FSDP2 derives a class from the original one
        kind = base
    return f"{kind.__module__}.{kind.__qualname__}"


def runs_ours(module: nn.Module, method: str = "forward") -> bool:
    """Return True if a method of ``module`` is replaced by a function of this package."""
    return isinstance(module.__dict__.get(method), Replacement)


def reaches_ours(module: nn.Module, method: str = "forward") -> bool:
    """Return True if a method of ``module`` is replaced by ours, or by a wrapper around ours, such as accelerate's."""
    return isinstance(_unwrapped(module.__dict__.get(method)), Replacement)


def options_of(module: nn.Module, method: str = "forward") -> Mapping[str, Any]:
    """Return the options of our replacement of a method of ``module``; none if the method is not ours."""
    replacement = _unwrapped(module.__dict__.get(method))
    return replacement.options if isinstance(replacement, Replacement) else {}


def _unwrapped(value: Any) -> Any:
    """Return the function inside bound methods and ``__wrapped__`` wrappers, to recognise a replacement."""
    while isinstance(value, types.MethodType) or (callable(value) and hasattr(value, "__wrapped__")):
        value = value.__func__ if isinstance(value, types.MethodType) else value.__wrapped__
    return value


def is_untouched(module: nn.Module) -> bool:
    """Return True if calling ``module`` only runs its class's ``forward`` or our replacement, without hooks."""
    return not has_hooks(module) and ("forward" not in module.__dict__ or runs_ours(module))


def computes(x: Tensor) -> bool:
    """Return True if our ops can compute an adopted model's ``x``: it is not nested, traced, or float64 on a GPU."""
    if x.is_nested or torch._C._get_tracing_state() is not None:
        return False
    return x.device.type == "cpu" or (x.device.type == "cuda" and x.dtype != torch.float64)
