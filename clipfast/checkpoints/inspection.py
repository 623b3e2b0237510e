"""``inspect_checkpoint``: a description of a checkpoint, from its file alone."""

import dataclasses
from collections import Counter
from pathlib import Path

from ..io.files import sha256
from .layouts import read_contents
from .tensor_shapes import config_of_weights, models_of_shapes, name_of, stored_sizes

# These buffers of BatchNorm do not count as parameters.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """A description of a checkpoint. An attribute is None if the checkpoint does not tell it.

    Attributes:
        source: the file or folder.
        layout: the kind of file or folder, in words.
        models: the names of the models that match. There are several if the checkpoint does not tell the activation,
            and none if no model of clipfast has these sizes.
        parameters: the number of parameters.
        dtypes: the number of tensors of each dtype.
        activation: "GELU" or "QuickGELU"; of SigLIP "GELU" or "tanh GELU", of both towers if they differ.
        image_size, context_length: the sizes for which the weights have positions.
        mean, std, interpolation, resize_mode: the preprocessing settings.
        epoch, step: the number of finished epochs and steps of training.
        sha256: the checksum of each file of weights, by name.
        file_bytes: the size of these files.
    """

    source: str
    layout: str
    models: tuple[str, ...]
    parameters: int
    dtypes: dict[str, int]
    activation: str | None
    image_size: int
    context_length: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str
    epoch: int | None
    step: int | None
    sha256: dict[str, str]
    file_bytes: int


def inspect_checkpoint(
    source: str | Path, *, trust: bool = False, cache_dir: str | Path | None = None
) -> CheckpointInfo:
    """Describe a checkpoint: its layout, model, sizes and checksums. No model is built.

    Args:
        source: as :func:`clipfast.convert_checkpoint` takes it.
        trust: read a TorchScript archive, which may run its code.
        cache_dir: the folder of the hub's cache; default: huggingface_hub's own.

    Raises:
        CheckpointError: it cannot be read, or holds no model that clipfast can build.
    """
    contents = read_contents(source, trust=trust, cache_dir=cache_dir)
    state = contents.state
    shown = config_of_weights(state, contents.source)
    known = contents.config
    name = None if known is None else name_of(known)
    image_size, context_length = stored_sizes(state, known or shown)
    images = contents.preprocessing
    return CheckpointInfo(
        source=str(contents.source),
        layout=contents.layout,
        models=tuple(models_of_shapes(shown)) if known is None else () if name is None else (name,),
        parameters=sum(value.numel() for key, value in state.items() if not key.endswith(_STATISTICS)),
        dtypes=dict(Counter(str(value.dtype).removeprefix("torch.") for value in state.values())),
        activation=None if known is None else known.activation,
        image_size=image_size,
        context_length=context_length,
        mean=tuple(images["mean"]),
        std=tuple(images["std"]),
        interpolation=images["interpolation"],
        resize_mode=images["resize_mode"],
        epoch=contents.epoch,
        step=contents.step,
        sha256={file.name: sha256(file) for file in contents.files},
        file_bytes=sum(file.stat().st_size for file in contents.files),
    )
