"""All that ``clipfast train`` can be told: the flags, the recipes' keys and the checks are made from it."""

import argparse
import dataclasses
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

PRECISIONS = ("auto", "fp32", "amp", "amp_bf16", "pure_bf16")
AUTO = "auto"


def _flag(
    default: Any,
    text: str,
    *,
    kind: type = str,
    many: bool = False,
    choices: Sequence[str] | None = None,
    auto: bool = False,
) -> Any:
    metadata = {"help": text, "kind": kind, "many": many, "choices": choices, "auto": auto}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. Names follow OpenCLIP's flags; the help text of each is its documentation."""

    train_data: str = _flag(
        "", "WebDataset shards (.tar, .tar.gz): braces and '::' expand; 'bundled:emoji/noto' ships inside"
    )
    train_num_samples: int | None = _flag(
        None, "pairs per epoch; default: counted by reading the shards once", kind=int
    )
    model: str = _flag("ViT-B-32", "model name (clipfast.list_models()) or path of an OpenCLIP model JSON")
    pretrained: str | None = _flag(None, "checkpoint to start the weights from")
    force_patch_dropout: float | None = _flag(
        None, "drop this share of each image's patches in training, whatever the model says (FLIP)", kind=float
    )
    batch_size: int = _flag(256, "pairs per step", kind=int)
    micro_batch_size: int | str | None = _flag(
        None,
        "hold activations of so many pairs at a time, for one more forward pass; the gradient stays that of the batch, "
        "but BatchNorm normalises by micro-batch; auto: the most that a GPU has room for (default: the whole batch)",
        kind=int,
        auto=True,
    )
    epochs: int = _flag(32, "passes over train-num-samples", kind=int)
    lr: float = _flag(5e-4, "peak learning rate", kind=float)
    wd: float = _flag(0.2, "weight decay; not on gains, biases and the logit scale", kind=float)
    beta1: float = _flag(0.9, "AdamW", kind=float)
    beta2: float | None = _flag(None, "AdamW; default 0.98 for vision transformers, 0.999 for ResNets", kind=float)
    eps: float | None = _flag(None, "AdamW; default 1e-6 for vision transformers, 1e-8 for ResNets", kind=float)
    warmup: int = _flag(2000, "steps of linear warm-up, before a cosine to zero", kind=int)
    grad_clip_norm: float | None = _flag(None, "clip the gradient to this norm", kind=float)
    precision: str = _flag("auto", "auto is amp_bf16 on a GPU and fp32 elsewhere; amp is amp_bf16", choices=PRECISIONS)
    grad_checkpointing: bool = _flag(False, "recompute activations in the backward pass", kind=bool)
    selective_checkpointing: bool = _flag(
        False, "recompute norms and activations only: less memory saved, hardly any time lost", kind=bool
    )
    torchcompile: bool = _flag(False, "compile the model with torch.compile, as one graph", kind=bool)
    cuda_graphs: bool = _flag(
        False,
        "replay the step as one CUDA graph: for small models, whose kernels the host starts too slowly",
        kind=bool,
    )
    device: str = _flag("auto", "auto is cuda where there is one")
    backend: str = _flag("auto", "what the ops run on", choices=("auto", "triton", "torch"))
    workers: int = _flag(1, "data worker processes; at most one per shard", kind=int)
    seed: int = _flag(0, "of everything random", kind=int)
    unique_by: str | None = _flag(None, "let no two pairs of a batch share this key of their json, or 'caption'")
    keyword_prob: float = _flag(0.0, "how often to add keywords of a pair's json to its caption", kind=float)
    crop_scale: tuple[float, float] = _flag(
        (0.9, 1.0), "least and largest share of the area of the random crop; 1 1: the centre", kind=float, many=True
    )
    affine: float = _flag(
        0.0, "augmentation: rotate by up to 100 times this in degrees, shift and scale by up to this share", kind=float
    )
    color_jitter: float = _flag(
        0.0, "augmentation: brightness, contrast and saturation change by up to this share", kind=float
    )
    hue: float = _flag(0.0, "augmentation: turn the colour wheel by up to this share, at most 0.5", kind=float)
    gray_prob: float = _flag(0.0, "augmentation: how often an image loses its colour", kind=float)
    val_data: str | None = _flag(
        None, "labelled shards or image folder for zero-shot accuracy and retrieval after each epoch"
    )
    val_group_by: str | None = _flag(None, "key of the validation json to report accuracy by")
    val_leave_out: tuple[str, ...] = _flag((), "groups that a second accuracy does without", many=True)
    max_bad_fraction: float = _flag(0.01, "stop when more than this share of the pairs cannot be decoded", kind=float)
    save_every: int = _flag(0, "also save each so many steps (0: after each epoch only)", kind=int)
    save_frequency: int = _flag(1, "keep epoch_N.pt for each so many epochs (0: only epoch_latest.pt)", kind=int)
    log_every_n_steps: int = _flag(50, "steps between log lines", kind=int)
    name: str | None = _flag(None, "of the run; default: recipe or model, and the time")
    logs: str = _flag("runs", "folder that the run's own folder is made in")

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built.

        Raises:
            ValueError: naming the flag, its value, and what would fit.
        """
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        if self.cuda_graphs and self.micro_batch_size is not None:
            raise ValueError("--cuda-graphs replays a whole batch: leave out --micro-batch-size, or --cuda-graphs")
        if self.val_leave_out and self.val_group_by is None:
            raise ValueError("--val-leave-out needs --val-group-by: the key that says which group an image is in")
        if not self.train_data:
            raise ValueError("--train-data is needed: shards such as 'data/{000..099}.tar', or use --recipe emoji")
        positive = ("batch_size", "micro_batch_size", "epochs", "lr", "log_every_n_steps")
        not_negative = (
            "wd",
            "warmup",
            "workers",
            "keyword_prob",
            "affine",
            "color_jitter",
            "hue",
            "gray_prob",
            "max_bad_fraction",
            "save_every",
            "save_frequency",
        )
        for name in positive:
            value = getattr(self, name)
            if value not in (None, AUTO) and value <= 0:
                raise ValueError(f"{flag_name(name)} must be more than 0, got {value}")
        for name in not_negative:
            if getattr(self, name) < 0:
                raise ValueError(f"{flag_name(name)} must not be negative, got {getattr(self, name)}")
        for name, limit in (
            ("hue", 0.5),
            ("affine", 1),
            ("gray_prob", 1),
            ("keyword_prob", 1),
            ("max_bad_fraction", 1),
        ):
            if getattr(self, name) > limit:
                raise ValueError(f"{flag_name(name)} must be at most {limit}, got {getattr(self, name)}")
        if self.force_patch_dropout is not None and not 0 <= self.force_patch_dropout < 1:
            raise ValueError(f"--force-patch-dropout must be from 0 to less than 1, got {self.force_patch_dropout}")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"--crop-scale needs two shares of the area, 0 < low <= high <= 1, got {low} {high}")
        if self.train_num_samples is not None and self.train_num_samples < self.batch_size:
            raise ValueError(
                f"--train-num-samples {self.train_num_samples} is less than one batch of {self.batch_size}"
            )
        for name, choices in (("precision", PRECISIONS), ("backend", ("auto", "triton", "torch"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{flag_name(name)} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


def _check_type(field: dataclasses.Field[Any], value: Any) -> None:
    kind, many = field.metadata["kind"], field.metadata["many"]
    if (value is None and field.default is None) or (field.metadata["auto"] and value == AUTO):
        return
    accepted = (int, float) if kind is float else kind
    values = value if many and isinstance(value, tuple) else (value,)
    right = all(isinstance(one, accepted) and (kind is bool or not isinstance(one, bool)) for one in values)
    if not right or isinstance(value, tuple) != many:
        expected = f"a list of {kind.__name__}" if many else kind.__name__
        expected += " or 'auto'" if field.metadata["auto"] else ""
        raise ValueError(f"{flag_name(field.name)} must be {expected}, got {value!r}")


def _int_or_auto(text: str) -> int | str:
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be int or 'auto', got {text!r}") from None


def flag_name(field: str) -> str:
    """``batch_size`` as ``--batch-size``."""
    return "--" + field.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each option; what is not given stays absent, so that a recipe can fill it."""
    for field in dataclasses.fields(TrainConfig):
        meta = field.metadata
        default: Any = field.default
        shown = (
            ""
            if default in (None, "", (), False)
            else f" (default: {' '.join(map(str, default)) if meta['many'] else default})"
        )
        options: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": meta["help"].replace("%", "%%") + shown,
        }
        if meta["kind"] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {
                "type": _int_or_auto if meta["auto"] else meta["kind"],
                "choices": meta["choices"],
                "metavar": None if meta["choices"] else meta["kind"].__name__.upper(),
            }
        if meta["many"]:
            options["nargs"] = "*" if default == () else len(default)
        parser.add_argument(flag_name(field.name), **options)


def list_recipes() -> list[str]:
    """Names of the recipes that ship inside the package."""
    return sorted(path.name.removesuffix(".toml") for path in files("clipfast").joinpath("recipes").iterdir())


def read_recipe(name: str) -> dict[str, Any]:
    """Options of a bundled recipe, or of a TOML file.

    Raises:
        ValueError: no such recipe, not TOML, or a key that is no option.
    """
    source = files("clipfast").joinpath(f"recipes/{name}.toml") if name in list_recipes() else Path(name)
    if not source.is_file():
        raise ValueError(f"no recipe {name!r}: neither a file nor one of {', '.join(list_recipes())}")
    try:
        raw = tomllib.loads(source.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {name} is not TOML: {error}") from error
    options = {key.replace("-", "_"): tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    unknown = set(options) - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        raise ValueError(f"recipe {name} has unknown options: {', '.join(sorted(unknown))}")
    return options
