"""The options of a verification: names of ops, models, dtypes and peers, which are checked before anything runs."""

import dataclasses
import importlib.util
from collections.abc import Iterable
from typing import Any

import torch

from ..io.text import meant
from ..kernels.dtypes import DTYPES as DTYPES_BY_NAME
from ..kernels.dtypes import dtype_name
from ..kernels.hardware import ARCHITECTURES
from ..kernels.spec import LEGS, specs
from ..models import list_models

MODEL, CURVE = "model", "curve"
OPENCLIP, HF = "openclip", "hf"
OPS = (*specs(), MODEL, CURVE)
DTYPES = tuple(map(dtype_name, DTYPES_BY_NAME.values()))
DTYPE_NAMES = {short: dtype_name(dtype) for short, dtype in DTYPES_BY_NAME.items()} | {name: name for name in DTYPES}
# Maps a peer, with whose models clipfast's are compared, to its module and its argument of ``pip install``.
PEERS = {OPENCLIP: ("open_clip", "open-clip-torch==3.3.0"), HF: ("transformers", "transformers")}
DEFAULT_MODEL = "ViT-T-8-32"
# On this leg, ttsem executes other people's kernels, and finds races and accesses out of bounds.
SANITIZER = "ttsem"
HANG_SECONDS = 300.0  # a leg's process that gives no result for this long counts as hung, and is killed


def installed(peer: str) -> bool:
    """Return whether a peer ("openclip" or "hf"), with whose models clipfast's are compared, can be imported."""
    return importlib.util.find_spec(PEERS[peer][0]) is not None


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of ``clipfast verify``. Each list is checked when an instance is made.

    Raises:
        ValueError: a name is unknown; the message lists the known names.
        RuntimeError: a requested device or package is missing.
    """

    ops: tuple[str, ...] = OPS
    models: tuple[str, ...] = (DEFAULT_MODEL,)
    dtypes: tuple[str, ...] = DTYPES  # PyTorch's names, such as "float32", or short names, such as "fp32"
    against: tuple[str, ...] | None = None  # peers of the models, "openclip" or "hf"; None: OpenCLIP if it is installed
    device: str = "auto"  # "cpu", "cuda" or "auto", which is a GPU if there is one
    quick: bool = False  # whether to run fewer cases, which take about a minute on two cores
    legs: tuple[str, ...] | None = None  # "cpu", "interpreter", "cuda"; None: the legs that suit the device
    others: tuple[str, ...] = ()  # checks of other people's kernels, MODULE:NAME, in place of all ops
    archs: tuple[int, ...] = (80, 90)  # compute capabilities that other people's kernels are compiled for
    golden: str = ""  # a file of golden curves to compare with, in place of all checks
    update: bool = False  # whether to write the file ``golden`` in place of comparing with it
    hang_seconds: float = HANG_SECONDS  # the subprocess of a leg is killed if it gives no result for this long

    def __post_init__(self) -> None:
        _check_known("--op", self.ops, OPS)
        _check_known("--dtype", self.dtypes, tuple(DTYPE_NAMES))
        _check_known("--model", self.models, tuple(list_models()))
        _check_known("--against", self.against or (), tuple(PEERS))
        _check_known("--device", (self.device,), ("auto", "cpu", "cuda"))
        _check_known("legs", self.legs or (), (*LEGS, SANITIZER))
        _check_known("--arch", self.archs, tuple(ARCHITECTURES))
        object.__setattr__(self, "dtypes", tuple(dict.fromkeys(DTYPE_NAMES[name] for name in self.dtypes)))
        if self.update and not self.golden:
            raise ValueError("--update writes the file of --golden: name it")
        if self.golden and self.others:
            raise ValueError(f"--golden checks no kernels: leave out {' '.join(self.others)}, or run it apart")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("--device cuda: PyTorch sees no CUDA GPU here")
        for peer in self.against or ():
            if not installed(peer):
                raise RuntimeError(f"--against {peer}: not installed; pip install {PEERS[peer][1]}")

    @property
    def on_gpu(self) -> bool:
        """Return whether the verification runs the kernels natively on a GPU."""
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())

    def to_dict(self) -> dict[str, Any]:
        """Return the options of a verification for JSON, with lists in place of tuples."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Options":
        """Restore the options of a verification from :meth:`to_dict`."""
        given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
        return cls(**given)


def _check_known(flag: str, given: Iterable[object], known: tuple[object, ...]) -> None:
    """Raise ValueError if a name that a flag of ``clipfast verify`` was given is unknown."""
    unknown, names = [name for name in given if name not in known], [str(name) for name in known]
    if unknown:
        raise ValueError(
            f"{flag}: unknown {', '.join(map(repr, unknown))}{meant(str(unknown[0]), names)}; known: {', '.join(names)}"
        )
