"""A dispatch mode that sees the PyTorch ops within our own ops, which PyTorch itself shows as one."""

from typing import Any

from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode


class InsideOps(TorchDispatchMode):
    """Call :meth:`see` for each PyTorch op before it runs, those that our ops call included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def see(self, func: Any, args: Any) -> None:
        """Look at one call of a PyTorch op."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "clipfast":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        self.see(func, args)
        return func(*args, **kwargs)
