"""clipfast: the performance engine for CLIP.

Triton kernels (``clipfast.kernels``) under a thin model layer with OpenCLIP's names, checked against PyTorch
references. ``api`` lists the public names. PyTorch and Triton are imported when one of them is first asked for, so that
the command line can print its help without them.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# kernels/ lies beside clipfast/ in a checkout, and an installation puts it inside.
if find_spec(f"{__name__}.kernels") is None:
    raise ImportError("clipfast is not installed: run pip install -e . in the checkout")

if TYPE_CHECKING:
    from .api import *  # noqa: F403
else:

    def __getattr__(name):
        """Import the public names, and return the one that is asked for (PEP 562)."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        api = import_module(".api", __name__)
        globals().update({public: getattr(api, public) for public in api.__all__}, __all__=api.__all__)
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__():
        """Return the public names, and those of the modules that are loaded."""
        return sorted({*globals(), *import_module(".api", __name__).__all__})
