"""Linear interpolation of the weights of two checkpoints (WiSE-FT: Wortsman et al. 2022).

A model that was finetuned on new images is often worse on other images than before. A model with interpolated weights
can be good at both. BatchNorm's statistics are interpolated as well.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import CheckpointError
from ..checkpoints.contents import Contents, copy_tokenizer
from ..checkpoints.layouts import read_contents
from ..checkpoints.open_clip_folder import write_open_clip_folder
from ..checkpoints.preprocessing import check_preprocessing, complete_preprocessing
from ..checkpoints.resolve import Wishes, resolve
from ..factory import set_preprocessing, tokenizer_for, transform_of
from ..io.files import write_folder
from ..models import CLIP, CLIPConfig, SigLIPConfig, build
from ..models.file_tokenizer import FileTokenizer
from ..models.tokenizer import Tokenizer
from .encoder import Encoder
from .labelled import LabelledSet
from .watch import Evaluator
from .zero_shot import Template

# Two checkpoints may differ in these entries of the configuration, since features of an input do not depend on them.
# The first checkpoint's values are used.
_FREE = (
    "patch_dropout", "init_logit_scale", "init_logit_bias", "tokenizer", "image_seq_len", "enable_patch_interpolator",
)  # fmt: skip


class Interpolation:
    """The models whose weights are interpolated between two checkpoints.

    Args:
        first, second: the checkpoints; anything that :func:`clipfast.convert_checkpoint` takes as its source. For
            NaFlex models, the number of patches of an image is that of the first checkpoint.
        model, activation: as for :func:`clipfast.convert_checkpoint`, for checkpoints that do not tell their model.
        cache_dir: the folder of the hub's cache.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the two hold different models or prepare images differently.
    """

    def __init__(
        self,
        first: str | Path,
        second: str | Path,
        *,
        model: str | None = None,
        activation: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        wishes = Wishes(model, activation)
        self.first, self.second = (
            resolve(read_contents(source, cache_dir=cache_dir), wishes) for source in (first, second)
        )
        self.config = self.first.settled_config
        is_siglip = isinstance(self.config, SigLIPConfig)
        self.preprocessing, theirs = (
            complete_preprocessing(one.preprocessing, is_siglip=is_siglip) for one in (self.first, self.second)
        )
        check_preprocessing(self.preprocessing, self.first.source)
        _refuse_difference(self.first, self.second, _settings(self.config), _settings(self.second.settled_config))
        _refuse_difference(self.first, self.second, self.preprocessing, theirs)

    def weights(self, alpha: float) -> dict[str, Tensor]:
        """Return the interpolated weights (1 - alpha) * first + alpha * second, in float32.

        At 0 and 1 they equal the weights of the checkpoints bit by bit. Integer tensors are taken from the first one.

        Raises:
            ValueError: ``alpha`` is not from 0 to 1.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be from 0 (the first checkpoint) to 1 (the second), got {alpha}")
        return {
            name: torch.lerp(value.float(), self.second.state[name].float(), alpha)
            if value.is_floating_point()
            else value
            for name, value in self.first.state.items()
        }

    def build(self, device: str | torch.device, backend: str = "auto") -> CLIP:
        """Build a model in evaluation mode, with random weights, into which interpolated weights can be loaded."""
        with torch.device(device):
            model = build(self.config).eval()
        set_preprocessing(model, self.preprocessing)
        model.set_backend(backend)
        return model

    def tokenizer(self, file: str | Path | None = None) -> Tokenizer | FileTokenizer:
        """Return the tokenizer of the interpolated models; SigLIP's is read from ``file``, or from beside a checkpoint.

        Raises:
            ValueError: no tokenizer is found, or it does not fit the model.
        """
        beside = next((path.parent for one in (self.first, self.second) for path in one.tokenizer), None)
        return tokenizer_for(self.config, str(self.first.source), file, beside)

    def save(self, alpha: float, folder: Path) -> None:
        """Write the interpolated model at ``alpha`` as a folder in OpenCLIP's layout.

        Raises:
            ValueError: ``alpha`` is not from 0 to 1.
            FileExistsError: ``folder`` exists.
            DiskFullError: there is no space.
        """
        weights = self.weights(alpha)

        def write(temporary: Path) -> None:
            """Write the interpolated model into a temporary folder."""
            write_open_clip_folder(temporary, self.config, self.preprocessing, weights)
            copy_tokenizer(temporary, self.first.tokenizer or self.second.tokenizer)

        write_folder(folder, write)


def evaluate_path(
    models: Interpolation,
    alphas: Iterable[float],
    data: Mapping[str, LabelledSet],
    templates: Sequence[Template] = ("{}",),
    *,
    classnames: Sequence[str] | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    backend: str = "auto",
    tokenizer: str | Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Evaluate the model at each alpha, and yield ``{"alpha": ..., "results": {name of the set: its results}}``.

    Args:
        models: the models.
        alphas: the shares of the second checkpoint in the weights, from 0 to 1.
        data: the sets by name.
        templates, classnames: as :func:`~clipfast.evaluate.evaluate.evaluate` takes them.
        batch_size: images to encode at once.
        device, backend: the device, and the implementation of the ops.
        tokenizer: the tokenizer's file, for a SigLIP model.

    Raises:
        ValueError: an alpha, a set or the tokenizer cannot be used.
    """
    model = models.build(device, backend)
    transform = transform_of(model, uint8=True)
    encoder = Encoder(str(models.first.source), model, models.tokenizer(tokenizer), transform, device)
    sets = {name: Evaluator(images, templates, classnames, batch_size=batch_size) for name, images in data.items()}
    for alpha in alphas:
        model.load_state_dict(models.weights(alpha))
        yield {"alpha": alpha, "results": {name: one.results(encoder) for name, one in sets.items()}}


def _settings(config: CLIPConfig) -> dict[str, Any]:
    """Return the entries of a configuration that must be equal for interpolation, as one flat dict."""
    flat: dict[str, Any] = {"kind": type(config).__name__}
    for key, value in dataclasses.asdict(config).items():
        parts = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{part}" if part else key: one for part, one in parts.items()}
    return {key: value for key, value in flat.items() if key.rpartition(".")[2] not in _FREE}


def _refuse_difference(first: Contents, second: Contents, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the settings ``ours`` and ``theirs`` of two checkpoints to be interpolated differ."""
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if keys:
        raise CheckpointError(
            f"{first.source} and {second.source} cannot be interpolated: "
            + "; ".join(f"{key} is {ours.get(key)} in the first and {theirs.get(key)} in the second" for key in keys)
        )
