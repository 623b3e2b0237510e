"""A small embedded set that the tests of the commands share."""

import pytest
import torch

from clipfast import Embeddings, create_model
from clipfast.checkpoint import export_open_clip
from clipfast.cli import main

from ..clip.conftest import picture, sample, write_shard


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Two models, 24 pairs, of which numbers 20 and 21 have the picture of 3, or a larger one, and embeddings."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("tqdm")
    folder = tmp_path_factory.mktemp("commands")
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        export_open_clip(create_model("ViT-T-8-32"), folder / name)
    changes = {20: {"png": picture(3)}, 21: {"png": picture(3, size=48)}}
    write_shard(folder / "data.tar", [sample(index, **changes.get(index, {})) for index in range(24)])
    arguments = ["--model", f"local-dir:{folder}/model", "--data", str(folder / "data.tar"), "--device", "cpu"]
    assert main(["embed", *arguments, "--output", str(folder / "embedded")]) == 0
    both = Embeddings.open(folder / "embedded")
    Embeddings(both.features, both.metadata, about=both.about).save(folder / "pictures")
    (folder / "one.png").write_bytes(picture(3))
    (folder / "two.png").write_bytes(picture(7))
    return folder
