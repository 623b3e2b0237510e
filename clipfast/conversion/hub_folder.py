"""The files of one model in a repository of the hub, as a folder that the readers of folders take."""

import contextlib
import logging
from pathlib import Path

from ..checkpoint import CONFIG_NAME, WEIGHTS_NAMES
from ..hub import HUB_PREFIX, HubError, fetch
from . import hugging_face
from .tokenizer_files import TOKENIZER_FILES

log = logging.getLogger("clipfast")


def fetch_folder(
    repository: str, cache_dir: str | Path | None = None, *, weights: bool = True, tokenizer: bool = False
) -> Path:
    """Return the folder in the cache with a model's files, all of one commit; what is not there is downloaded.

    Args:
        repository: "ORG/REPO", in OpenCLIP's layout or else in that of transformers.
        cache_dir: the folder of the cache; default: huggingface_hub's own.
        weights: whether the weights are wanted; without them, only what describes the model is fetched.
        tokenizer: whether the files of a tokenizer are wanted, where there are any.

    Raises:
        HubError: there is no such repository, a file is missing in it, or is not in the cache of an offline machine.
    """
    config = fetch(repository, CONFIG_NAME, hugging_face.CONFIG_NAME, cache_dir=cache_dir)
    folder = config.parent  # its name is the commit

    def more(*names: str) -> Path:
        return fetch(repository, *names, cache_dir=cache_dir, revision=folder.name)

    if config.name == CONFIG_NAME:
        if weights:
            more(*WEIGHTS_NAMES)
    else:
        try:
            more(*hugging_face.PROCESSOR_NAMES)
        except HubError:
            log.warning(
                f"{HUB_PREFIX}{repository} has no {hugging_face.PROCESSOR_NAMES[0]}, or it is not in the cache: images "
                "are prepared as is usual for the kind of model"
            )
        if weights:
            more(*hugging_face.WEIGHTS_NAMES)
            for part in hugging_face.weights_files(folder):
                more(part.name)
    if tokenizer:
        fetch_tokenizer(repository, folder.name, cache_dir)
    return folder


def fetch_tokenizer(repository: str, commit: str, cache_dir: str | Path | None = None) -> None:
    """Bring what files of a tokenizer a commit of the repository has into its folder in the cache."""
    for name in TOKENIZER_FILES:
        with contextlib.suppress(HubError):
            fetch(repository, name, cache_dir=cache_dir, revision=commit)
