"""Files of repositories on the Hugging Face hub, through ``huggingface_hub`` (the extra "hub") and its cache.

A file that is in the cache needs no network. ``huggingface_hub`` compares the size of a download with the
one that the hub states.
"""

import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from .. import __version__
from .checkpoint import CheckpointError

HUB_PREFIX = "hf-hub:"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".json")


class HubError(CheckpointError):
    """A file that is neither on the hub nor in its cache; the message names the file and a remedy."""


def repository_of(name: str) -> str | None:
    """Return the hub repository for a model's name: "hf-hub:ORG/REPO", or "ORG/REPO" if no such path exists.

    Returns:
        "ORG/REPO", or None for any other name.
    """
    if name.startswith(HUB_PREFIX):
        return name.removeprefix(HUB_PREFIX)
    is_path = Path(name).exists() or Path(name).parent.is_dir() or name.endswith(_FILE_SUFFIXES)
    return name if _REPOSITORY.fullmatch(name) and not is_path else None


def fetch(repository: str, *names: str, cache_dir: str | Path | None = None, revision: str | None = None) -> Path:
    """Return the first file of ``names`` that the repository has, downloaded into the cache if it is not there.

    If the hub does not answer whether it has one of the files, later names are only searched in the cache, since a
    download might not be the preferred file.

    Args:
        repository: "ORG/REPO".
        *names: names of files, the preferred one first.
        cache_dir: the folder of the cache; default: huggingface_hub's own.
        revision: the commit, tag or branch; default: the main branch.

    Raises:
        HubError: huggingface_hub is not installed, there is no such repository, it has none of the files, or they are
            not in the cache and the hub cannot be reached.
    """
    try:
        from huggingface_hub import constants, errors, hf_hub_download
    except ImportError as error:
        raise HubError(
            f"{names[0]} of {HUB_PREFIX}{repository} needs huggingface_hub, which is not installed: "
            "pip install 'clipfast[hub]'"
        ) from error
    failures: list[Exception] = []
    only_cached = not (constants.HF_HUB_OFFLINE or _has_network(constants.ENDPOINT))
    for name in names:
        try:
            return Path(
                hf_hub_download(
                    repository, name, cache_dir=cache_dir, revision=revision, library_name="clipfast",
                    library_version=__version__, local_files_only=only_cached,
                )
            )  # fmt: skip
        except Exception as error:  # huggingface_hub raises errors of the network, too
            if not only_cached or not failures:
                failures.append(error)
            is_missing = isinstance(error, errors.EntryNotFoundError)
            only_cached |= not is_missing or isinstance(error, errors.LocalEntryNotFoundError)
    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    raise HubError(_explain(repository, names, failures, cache)) from failures[-1]


def _has_network(endpoint: str) -> bool:
    """Return False if the host of the hub has no address; huggingface_hub would try to reach it for 25 seconds."""
    try:
        return bool(getproxies().keys() - {"no"} or socket.getaddrinfo(urlsplit(endpoint).hostname, None))
    except OSError:
        return False


def _explain(repository: str, names: tuple[str, ...], failures: list[Exception], cache: Path) -> str:
    """Return the reason why the hub's file was not found, and a remedy."""
    from huggingface_hub import constants, errors

    wanted = " or ".join(names)
    label = f"{HUB_PREFIX}{repository}"
    if any(isinstance(failure, errors.HFValidationError) for failure in failures):
        return f"{label} is no name of a repository, which is ORG/REPO: {failures[0]}"
    if any(isinstance(failure, errors.RepositoryNotFoundError) for failure in failures):
        return (
            f"{label}, which is to have {wanted}, does not exist on the hub, or is private or gated: check the name, "
            "or log in with: hf auth login"
        )
    unreachable = [failure for failure in failures if isinstance(failure, errors.LocalEntryNotFoundError)]
    if unreachable:
        cause = str(unreachable[0].__cause__ or f"{constants.ENDPOINT} has no address here").splitlines()[0]
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else cause
        return (
            f"{wanted} of {label} is not in the cache {cache}, and the hub cannot be reached ({reason:.200}): where "
            f"there is a network, run: hf download {repository} {names[0]}; then copy "
            f"models--{repository.replace('/', '--')} from its cache into this one, or give the path of the file"
        )
    if all(isinstance(failure, errors.EntryNotFoundError) for failure in failures):
        return f"{label} has no {wanted}"
    return f"{wanted} of {label} cannot be downloaded: {failures[-1]}"
