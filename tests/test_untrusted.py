"""Test that files and folders from strangers, whatever they hold, are read within bounds or refused with a reason."""

import json
import os
import threading
import zipfile

import numpy as np
import pytest
import torch

from clipfast import Embeddings, convert_checkpoint, create_model
from clipfast.checkpoints.checkpoint import CheckpointError, read_checkpoint
from clipfast.checkpoints.layouts import read_contents
from clipfast.checkpoints.of_run import Checkpoints
from clipfast.checkpoints.open_clip_folder import export_open_clip
from clipfast.checkpoints.sharded import check_parts
from clipfast.cli.search_arguments import Pictures
from clipfast.data import IndexCache, open_shards
from clipfast.evaluate.offline_layout import find_sets
from clipfast.models.file_tokenizer import FileTokenizer
from clipfast.models.images import open_image
from clipfast.models.registry import read_model_config
from clipfast.search import approximate, layout
from clipfast.search.source_samples import Samples

from .checkpoints.conftest import CONFIGS, make_model
from .small_runs import sample, write_shard


def shard(path):
    """Open a shard from an untrusted source."""
    return open_shards([str(path)], index=IndexCache(path.parent / "cache"))


def in_folder(read):
    """Return a function that takes the path of an untrusted file, and calls ``read`` with the file's folder."""
    return lambda path: read(path.parent)


@pytest.fixture
def pipe(tmp_path):
    """Return a function that puts a named pipe in the place of a file.

    A thread opens and closes the other end again and again, so code that wrongly opens the pipe reads an empty file
    and fails, instead of waiting forever.
    """
    made, closed = dict[os.PathLike, threading.Thread](), threading.Event()

    def write(path):
        """Open and close the named pipe that lies in place of a file, until the test ends."""
        while not closed.is_set():
            path.open("wb").close()

    def make(path):
        """Put a named pipe in the place of an untrusted file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        made[path] = threading.Thread(target=write, args=[path], daemon=True)
        made[path].start()
        return path

    yield make
    closed.set()
    for path, writer in made.items():
        while writer.is_alive():
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
            writer.join(0.1)


PIPES = {
    "x.tar": shard, "x.csv": shard, "x.parquet": shard, "x.tar.gz": shard, "x.png": open_image,
    "x.json": read_model_config, "manifest.json": in_folder(check_parts), "config.json": in_folder(read_contents),
    "open_clip_config.json": in_folder(read_contents), ".metadata": in_folder(read_contents), "x.pt": read_contents,
    "about.json": in_folder(Embeddings.open), "img_emb/img_emb_0000.npy": lambda path: Embeddings.open(path.parents[1]),
    "metadata/metadata_0000.parquet": lambda path: Embeddings.open(path.parents[1]),
    "wds_x/dataset_type.txt": lambda path: find_sets(path.parents[1]),
}  # fmt: skip


@pytest.mark.parametrize("name", PIPES)
def test_a_named_pipe_is_not_waited_for(name, pipe, tmp_path):
    pytest.importorskip("pyarrow")
    Embeddings(torch.randn(4, 8)).save(tmp_path / "folder")
    with pytest.raises((ValueError, OSError), match="regular file"):
        PIPES[name](pipe(tmp_path / "folder" / name))


CONFIGURATIONS = {
    "layers": ("ViT", "vision_cfg", {"layers": 10**9}, "layers must be at most 1,000"),
    "layers of a ResNet": ("ResNet", "vision_cfg", {"layers": [10**9, 1, 1, 1]}, "layers must be at most 1,000"),
    "an object of layers": ("ViT", "vision_cfg", {"layers": {}}, "layers must be a positive whole number"),
    "many blocks": ("ResNet", "vision_cfg", {"layers": [999] * 4}, "parameters or more, and the weights have"),
    "width": ("ViT", "vision_cfg", {"width": 1 << 20}, "parameters or more, and the weights have"),
    "positions": ("ViT", "vision_cfg", {"image_size": 16000}, "parameters or more, and the weights have"),
    "heads": ("ViT", "text_cfg", {"heads": 7}, "width must be a multiple of heads, got 32 and 7"),
    "std 0": ("ViT", "preprocess_cfg", {"std": [0.2, 0, 0.2]}, "std of images must be three positive numbers"),
    "mean": ("ViT", "preprocess_cfg", {"mean": [0.2, float("inf"), 0.2]}, "mean of images must be three numbers"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_that_no_model_has_is_refused_before_one_is_built(case, tmp_path):
    """Models of some of these configurations would take all memory or years to build; others would fail in use."""
    name, section, changes, message = CONFIGURATIONS[case]
    export_open_clip(make_model(CONFIGS[name]), tmp_path / "model")
    path = tmp_path / "model" / "open_clip_config.json"
    raw = json.loads(path.read_text())
    (raw if section == "preprocess_cfg" else raw["model_cfg"])[section] |= changes
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        create_model(f"local-dir:{tmp_path}/model")
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "model", tmp_path / "out.pt", "clipfast")
    assert not (tmp_path / "out.pt").exists()


def test_an_archive_that_unpacks_to_much_more_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(40 << 20))
    with pytest.raises(CheckpointError, match=r"refused: its .* bytes unpack to 41,943,040"):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("content", ["[" * 200_000 + "]" * 200_000, '{"a": {"size": NaN}}', "[]"], ids=len)
def test_after_a_hostile_manifest_the_older_checkpoint_is_tried(content, tmp_path):
    (tmp_path / "step_9").mkdir()
    (tmp_path / "step_9" / "manifest.json").write_text(content)
    torch.save({"state_dict": {"x": torch.zeros(2)}}, tmp_path / "step_3.pt")
    assert Checkpoints(tmp_path).newest_whole().path == tmp_path / "step_3.pt"


ABOUT = {
    "a billion parts": ({"parts": 10**9}, "lacks 999,999,999 of its 1,000,000,000 parts, the first of them number 1"),
    "no number of parts": ({"parts": -1}, "says that there are -1 parts"),
    "a list of keys": ({"keys": []}, "keys must be dict"),
    "keys of something else": ({"keys": {"images": [3]}}, "keys of images and texts are lists of names"),
    "a range of shards": ({"data": "{1..99999999}"}, "may name more than 4,194,304 shards"),
    "nested ranges": ({"data": "{x{1..1000}{1..1000}{1..1000},}"}, "may name more than 4,194,304 shards"),
}


@pytest.fixture
def embedded(tmp_path):
    """A folder of four embeddings of a shard of six pairs, of which the first two have numbers that no pair has."""
    pytest.importorskip("pyarrow")
    samples = Samples(str(write_shard(tmp_path / "a.tar", [sample(index) for index in range(6)])))
    Embeddings(torch.randn(4, 8), {"number": [-1, 10**15, 2, 3]}, about=samples.about()).save(tmp_path / "folder")
    return tmp_path / "folder"


@pytest.mark.parametrize("case", ABOUT)
def test_what_embeddings_say_of_themselves_is_checked(case, embedded):
    changes, message = ABOUT[case]
    raw = json.loads((embedded / "about.json").read_text()) | changes
    (embedded / "about.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        Pictures(Embeddings.open(embedded))


def test_no_other_picture_stands_for_one_that_is_not_there(embedded):
    pictures = Pictures(Embeddings.open(embedded))
    assert [pictures.item(place).image is None for place in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("kind", ["rows", "footer", "shape"])
def test_files_of_embeddings_that_unpack_to_too_much(kind, embedded, monkeypatch):
    """The limits for tables and footers are smaller here, so that small files of embeddings exceed them."""
    from pyarrow import parquet, table

    monkeypatch.setattr(layout, "MAX_TABLE", 1 << 20)
    monkeypatch.setattr(layout, "MAX_FOOTER", 1 << 12)
    path = embedded / "metadata" / "metadata_0000.parquet"
    rows = table({"caption": ["x" * 1000] * 4000 if kind == "rows" else ["x"] * 4})
    parquet.write_table(rows.replace_schema_metadata({"key": "y" * 10_000} if kind == "footer" else None), path)
    np.save(embedded / "img_emb" / "img_emb_0000.npy", np.zeros((len(rows), 8), np.float32))
    if kind == "shape":
        path = embedded / "img_emb" / "img_emb_0000.npy"
        path.write_bytes(path.read_bytes().replace(b"(4, 8), ", b"(-4, 8),"))
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read"):
        assert Embeddings.open(embedded).metadata


def test_what_would_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "MAX_TABLE", 1 << 20)
    embeddings = Embeddings(torch.zeros(40, 2), {"caption": ["x" * 50_000] * 40})
    with pytest.raises(ValueError, match="make smaller parts"):
        embeddings.save(tmp_path / "e")
    assert not list(tmp_path.iterdir())
    embeddings.save(tmp_path / "e", part_size=10)
    assert Embeddings.open(tmp_path / "e").metadata.equals(embeddings.metadata)


@pytest.mark.parametrize("broken", ["panic", "unknown"])
def test_a_tokenizer_that_fails_is_refused_when_it_is_opened(broken, tmp_path):
    pytest.importorskip("tokenizers")
    special = [{"SpecialToken": {"id": "X", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": special, "pair": [], "special_tokens": {}}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "decoder": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": template if broken == "panic" else None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]"[: 5 * (broken == "panic")]: 1}, "unk_token": "[UNK]"},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a file of the tokenizers package that can be used"):
        FileTokenizer(tmp_path)


def test_a_foreign_index_is_not_read(embedded, tmp_path, monkeypatch):
    """Faiss checks nothing in an index that it reads, so a foreign one could do harm; one in our own cache is read."""
    faiss = pytest.importorskip("faiss")
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    embeddings, query = Embeddings.open(embedded), torch.ones(1, 8)
    _, about = approximate.search(embeddings, embedded, query, 2, None, "image")
    (embedded / "faiss").mkdir(exist_ok=True)
    (embedded / "faiss" / "image.json").write_text(json.dumps(about | {"probes": 1}))
    (embedded / "faiss" / "image.index").write_bytes(b"foreign")
    read, read_index = [], faiss.read_index
    monkeypatch.setattr(faiss, "read_index", lambda path: read.append(path) or read_index(path))
    found, _ = approximate.search(embeddings, embedded, query, 2, None, "image")
    assert sorted(found.indices[0].tolist()) == sorted(embeddings.search(query, 2).indices[0].tolist())
    assert [path.startswith(str(tmp_path / "cache")) for path in read] == [True]
