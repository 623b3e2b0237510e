"""Converting a checkpoint from one layout into another."""

import dataclasses
import logging
from pathlib import Path

from ..io.files import check_target, write_folder
from ..models import SigLIPConfig
from ..models.siglip_config import EXACT, TANH
from . import TARGETS, hugging_face
from .checkpoint import CheckpointError, write_checkpoint
from .contents import Contents, copy_tokenizer, find_tokenizer
from .inspection import CheckpointInfo, inspect_checkpoint
from .layouts import read_contents
from .open_clip_folder import write_open_clip_folder
from .preprocessing import check_preprocessing
from .resolve import Wishes, activation_flag, resolve

log = logging.getLogger("clipfast")


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    to: str,
    *,
    model: str | None = None,
    activation: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    trust: bool = False,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
) -> CheckpointInfo:
    """Convert a checkpoint into another layout. The layout of ``source`` is recognised.

    Weights keep their bits and dtypes. The activation, the normalisation and resizing of images, the context length and
    the files of a tokenizer go along where the layout has a place for them; the state of training does not.

    Args:
        source: a checkpoint of OpenCLIP or clipfast (``.pt``, ``.bin`` or ``.safetensors``), a folder with
            ``open_clip_config.json``, a folder of transformers' CLIPModel or SiglipModel, a folder of
            torch.distributed.checkpoint, or OpenAI's TorchScript archive; or, on the Hugging Face hub,
            ``hf-hub:ORG/REPO`` or ``MODEL:TAG`` of :func:`clipfast.list_pretrained`.
        destination: the file or folder to write. It must not exist (see ``overwrite``); after an error it is as before.
        to: "open_clip" (a folder that OpenCLIP and clipfast load as ``local-dir:FOLDER``), "hf" (a folder for
            transformers) or "clipfast" (a ``.pt`` file that ``create_model`` builds by itself).
        model: the model's name, or the path of its JSON configuration, for a checkpoint that does not say it.
        activation: "gelu" or "quick_gelu", for a checkpoint that does not say it or is wrong; for SigLIP "gelu",
            "gelu_tanh", or two of them for images and texts, as in "gelu,gelu_tanh".
        image_size: resize the positions of patches to images of so many pixels a side.
        context_length: resize the positions of texts to so many tokens.
        trust: read a TorchScript archive, which may run its code.
        cache_dir: the folder of the hub's cache; default: huggingface_hub's own.
        overwrite: replace ``destination`` if it is a file. A folder is never replaced.

    Returns:
        The description of the new checkpoint by :func:`inspect_checkpoint`.

    Raises:
        CheckpointError: ``source`` cannot be read, does not tell a necessary setting, or does not fit its model; the
            message names the option that resolves it.
        ValueError: an argument is wrong, ``destination`` exists, or the layout cannot express the model
            (:class:`~clipfast.checkpoints.hugging_face_layout.NoCounterpartError`: transformers has no ResNets).
        DiskFullError: there is no space.
    """
    destination = Path(destination)
    wishes = Wishes(model, activation, image_size, context_length)
    _check_destination(destination, to, overwrite=overwrite)
    contents = resolve(read_contents(source, trust=trust, cache_dir=cache_dir), wishes)
    if to == "clipfast":
        _write_clipfast(destination, contents)
    else:
        write = _write_open_clip if to == "open_clip" else hugging_face.write_folder
        write_folder(destination, lambda folder: write(folder, contents))
        if (to == "hf" or isinstance(contents.config, SigLIPConfig)) and not find_tokenizer(destination):
            log.warning(
                f"{destination} has no tokenizer, because there is none beside {contents.source}: put tokenizer.json "
                "and tokenizer_config.json of the model into it"
            )
    return inspect_checkpoint(destination)


def _check_destination(destination: Path, to: str, *, overwrite: bool) -> None:
    """Refuse a destination of the converted checkpoint that exists, or a layout that is unknown."""
    if to not in TARGETS:
        raise ValueError(f"--to must be one of {', '.join(TARGETS)}, got {to!r}")
    if (destination.exists() or destination.is_symlink()) and not (overwrite and destination.is_file()):
        raise ValueError(f"{destination} exists already: name another destination, or remove it")
    check_target(destination)
    if to == "clipfast" and destination.suffix != ".pt":
        raise ValueError(f"with --to clipfast the destination is a file whose name ends in .pt, got {destination}")


def _write_clipfast(path: Path, contents: Contents) -> None:
    """Write the converted checkpoint in clipfast's layout."""
    check_preprocessing(contents.preprocessing, contents.source)
    own = {"model_config": contents.settled_config.to_dict(), "preprocess_cfg": dict(contents.preprocessing)}
    state = {name: value.contiguous() for name, value in contents.state.items()}
    write_checkpoint(path, {"state_dict": state, "clipfast": own})


def _write_open_clip(folder: Path, contents: Contents) -> None:
    """Write the converted checkpoint in OpenCLIP's layout."""
    _check_open_clip(contents)
    write_open_clip_folder(folder, contents.settled_config, contents.preprocessing, contents.state)
    copy_tokenizer(folder, contents.tokenizer)


def _check_open_clip(contents: Contents) -> None:
    """Refuse a SigLIP model whose activation OpenCLIP cannot express: there, the name of the image tower decides it."""
    config = contents.settled_config
    if not isinstance(config, SigLIPConfig) or config.is_in_timm:
        return
    other = dataclasses.replace(config, image_gelu=EXACT if config.image_gelu == TANH else TANH)
    if other.is_in_timm:
        raise CheckpointError(
            f"{contents.source} has {config.activation}, but OpenCLIP's tower {other.timm_model_name} has "
            f"{other.activation}: add --activation {activation_flag(other)} to write it all the same; features will "
            "differ slightly"
        )
