"""Fixtures of pairs and training runs for tests/train."""

from unittest import mock

import pytest

from clipfast.evaluate import zero_shot

from .. import small_runs
from ..small_runs import copied, finished, options, refusal, run_small, server, shards, small, store, together  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def without_pictures():
    """Let runs draw no pictures, which take a third of a small run; only the fixture ``finished`` has them."""
    with mock.patch("clipfast.train.loop._pictures", return_value=[]):
        yield


@pytest.fixture
def one_prompt(monkeypatch):
    """Use one prompt per class in place of 80 when training evaluates on ImageNet."""
    monkeypatch.setattr("clipfast.evaluate.imagenet.OPENAI_IMAGENET_TEMPLATES", ("{}",))
    monkeypatch.setattr(zero_shot, "TEMPLATES", zero_shot.TEMPLATES | {"openai": ("{}",)})


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    """Return a folder with a folder for each class of ImageNet, whose images are all equal."""
    folder = tmp_path_factory.mktemp("imagenet")
    (folder / "0.png").write_bytes(small_runs.picture(0))
    for number in range(1000):
        (folder / "val" / f"n{number:08d}").mkdir(parents=True)
        (folder / "val" / f"n{number:08d}" / "1.png").symlink_to(folder / "0.png")
    return str(folder / "val")
