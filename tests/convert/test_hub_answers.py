"""What the hub answers, or does not, while a file is fetched. There is no network: the download is replaced."""

from types import SimpleNamespace

import pytest

from clipfast.hub import HubError, fetch

pytest.importorskip("huggingface_hub")


def answer(status: int) -> object:
    """As much of a response as errors look at."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            lambda errors: errors.RepositoryNotFoundError("no", response=answer(404)),
            "does not exist on the hub, or is ",
        ),
        (lambda errors: errors.GatedRepoError("no", response=answer(403)), "private or gated: .*: hf auth login"),
        (
            lambda errors: errors.RemoteEntryNotFoundError("no", response=answer(404)),
            "^hf-hub:org/x has no a.bin or b$",
        ),
        (
            lambda errors: errors.HfHubHTTPError("server down", response=answer(500)),
            "cannot be downloaded: server down",
        ),
        (lambda errors: RuntimeError("broken pipe"), "a.bin or b of hf-hub:org/x cannot be downloaded: broken pipe"),
    ],
)
def test_what_the_hub_answers(error, message, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*arguments, **options):
        raise error(errors)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(HubError, match=message):
        fetch("org/x", "a.bin", "b")


@pytest.mark.parametrize("failure", ["timed out", "server down", "no cache"])
def test_no_other_file_is_downloaded_in_place_of_one_that_may_be_there(failure, monkeypatch, tmp_path):
    """After a time-out, config.json would make a repository of OpenCLIP one of transformers."""
    import huggingface_hub
    from huggingface_hub import errors

    def download(repository, name, *, local_files_only=False, **options):
        if name == "missing" and not local_files_only:
            raise errors.RemoteEntryNotFoundError("no", response=answer(404))
        if local_files_only and name != "cached":
            raise errors.LocalEntryNotFoundError("not in the cache")
        if name == "first":
            raise {
                "timed out": TimeoutError(failure),
                "server down": errors.HfHubHTTPError(failure, response=answer(500)),
                "no cache": errors.LocalEntryNotFoundError(failure),
            }[failure]
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fetch("org/x", "missing", "second") == tmp_path / "second"
    with pytest.raises(HubError, match="the hub cannot be reached" if failure == "no cache" else failure):
        fetch("org/x", "first", "second")
    assert fetch("org/x", "first", "cached") == tmp_path / "cached"
