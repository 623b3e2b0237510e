"""The checks before a run is built: refusals are one line, and nothing is written."""

import json
import os
import re
from pathlib import Path
from unittest import mock

import pytest

from clipfast.data import index
from clipfast.evaluate import labelled
from clipfast.runs.folder import RunFolder
from clipfast.train.preflight import preflight

from ..models.siglip import CONFIGS, save_tokenizer
from ..small_runs import TINY, sample, write_shard
from .test_training import config

PAIRS = [sample(number) for number in range(8)]


def changed(**changes: bytes) -> list[dict[str, bytes]]:
    """Return eight training pairs with some members changed, for the check before a run."""
    return [sample(number, **changes) for number in range(8)]


def without(*keys: str) -> list[dict[str, bytes]]:
    """Return eight training pairs without some members, for the check before a run."""
    return [{key: value for key, value in pair.items() if key not in keys} for pair in PAIRS]


@pytest.fixture(autouse=True)
def shard(tmp_path):
    """Write a training shard of eight pairs that can be used."""
    return write_shard(tmp_path / "x.tar", PAIRS)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (without("png"), "4 x no image.*x.tar/000: sample has no image.*only json with .*--image-key"),
        ([{"picture": pair["png"], "txt": pair["txt"]} for pair in PAIRS], "only picture, txt.*--image-key"),
        (without("txt", "json"), r"4 x no caption.*x.tar/000: sample has no caption \(txt.*7.jpg, 7.txt"),
        (without("txt"), r"sample has no caption \(txt.*--text-key"),
        (changed(txt=b" "), "4 x no caption.*x.tar/000: caption is empty"),
        (changed(png=b"GIF89"), "4 x not an image.*x.tar/000: .*convert such images, or leave"),
        (changed(png=PAIRS[0]["png"][:60]), "4 x broken image.*x.tar/000: image cannot be decoded"),
        (PAIRS[:7], "7 pairs, less than one batch of 8: lower --batch-size"),
        ([], "the shards hold no samples"),
    ],
    ids=["no image", "wrong key", "no caption", "json alone", "empty", "not an image", "broken", "too few", "none"],
)
def test_pairs_that_cannot_be_used(pairs, said, shard, refusal):
    write_shard(shard, pairs)
    assert re.search(said, refusal())
    write_shard(shard, PAIRS)
    assert refusal() == ""


def test_a_shard_that_is_not_there(tmp_path, refusal):
    pattern = f"{tmp_path}/{{a,b}}.tar"
    write_shard(tmp_path / "a.tar", PAIRS)
    assert f"no such shard: {tmp_path}/b.tar (1 of 2 are missing)" in refusal(train_data=pattern)
    (tmp_path / "b.tar").symlink_to(tmp_path / "c.tar")  # the target of the symbolic link does not exist either
    assert f"no such shard: {tmp_path}/b.tar (1 of 2 are missing)" in refusal(train_data=pattern)
    write_shard(tmp_path / "c.tar", PAIRS)
    assert refusal(train_data=pattern) == ""


def test_a_shard_without_permission(shard, refusal, monkeypatch):
    """Tests may run as root, for whom no file is unreadable, so the system's answer is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != shard)
    assert f"no permission to read {shard} (1 of 1 shards): chmod a+r, or leave it out" in refusal()


@pytest.mark.parametrize("content", [b"a photo", b"\x1f\x8b not gzip"])
def test_a_file_that_is_no_shard(content, shard, refusal):
    shard.write_bytes(content)
    assert re.search(f"shard {shard} cannot be read: .*; make it anew, or leave it out$", refusal())


def test_a_key_that_no_pair_has(refusal):
    assert re.search("4 x no such field.*x.tar/000: .* no 'breed' .* category, keywords", refusal(unique_by="breed"))
    assert refusal(unique_by="label") == ""


def test_one_part_of_a_mix_cannot_be_used(tmp_path, refusal):
    write_shard(tmp_path / "y.tar", without("png"))
    both = {"train_data": f"{tmp_path}/x.tar::{tmp_path}/y.tar"}
    assert refusal(**both) == ""  # half of the pairs can be used, which is enough
    assert "(4 x no image); first: y.tar/000" in refusal("--train-data-upsampling-factors", "1", "3", **both)


def test_a_tokenizer_that_does_not_fit(tmp_path, refusal):
    raw = json.loads(Path(TINY).read_text())
    raw["text_cfg"]["vocab_size"] = 1000
    (tmp_path / "narrow.json").write_text(json.dumps(raw))
    line = refusal(model=tmp_path / "narrow.json")
    assert "CLIP's tokenizer has 49408 tokens, and " in line
    assert "knows only 1000: set vocab_size of its text_cfg to 49408" in line
    siglip = {"model": tmp_path / "small.json"}
    siglip["model"].write_text(json.dumps(CONFIGS["exact"].to_dict()))  # the model's vocabulary has 300 tokens
    assert "needs the file tokenizer.json of its tokenizer, which clipfast does not ship" in refusal(**siglip)
    assert f"there is no tokenizer at {tmp_path}/none" in refusal(**siglip, tokenizer=tmp_path / "none")
    save_tokenizer(tmp_path / "fitting")
    assert refusal(**siglip, tokenizer=tmp_path / "fitting") == ""


def test_the_model_and_its_loss(refusal):
    assert f"--use-naflex needs a NaFlex model, such as naflex_ViT-B-16, and {TINY} takes images" in refusal(
        "--use-naflex"
    )
    assert "unknown model 'ViT-Z'" in refusal(model="ViT-Z")
    assert "no checkpoint at none.pt: there is no such file" in refusal(model="ViT-T-8-32", pretrained="none.pt")
    assert "is a CLIP model, which has no logit_bias: take a model with SigLIP in its name" in refusal("--siglip")
    assert refusal(model="ViT-T-8-32") == ""


def test_the_optimizer(refusal):
    locked = refusal("--lock-image", "--lock-text", opt="muon")
    assert "--opt muon trains matrices, and all of them are locked" in locked
    assert refusal("--lock-image", opt="muon") == ""
    assert refusal(opt="tests.train.test_optimizers:Reading") == ""


class TestValidation:
    """Validation data that cannot be used is refused."""

    def test_it_is_refused_and_named(self, tmp_path, refusal):
        assert "--val-data cannot be used: no such shard: v.tar" in refusal(val_data="v.tar")
        write_shard(tmp_path / "v.tar", changed(png=b"x"))
        (tmp_path / "images").mkdir()
        line = refusal(val_data=tmp_path / "v.tar")
        assert f"--val-data cannot be used: not one of the first 8 images of {tmp_path}/v.tar can be used; " in line
        assert "images has no sub-folders" in refusal(val_data=tmp_path / "images")
        write_shard(tmp_path / "v.tar", PAIRS)
        keys = {"val_data": tmp_path / "v.tar", "val_group_by": "breed"}
        assert "sample has no 'breed' in its json" in refusal(**keys)
        assert refusal(**keys | {"val_group_by": "category"}) == ""

    def test_only_its_beginning_is_looked_at(self, tmp_path, refusal, monkeypatch):
        monkeypatch.setattr(labelled, "CHECKED", 3)
        for bad, expected in ((2, ""), (3, "not one of the first 3 images of ")):
            write_shard(tmp_path / "v.tar", [*changed(png=b"x")[:bad], *PAIRS])
            assert expected in refusal(val_data=tmp_path / "v.tar")
            assert (refusal(val_data=tmp_path / "v.tar") == "") == (expected == "")


class TestSample:
    """The selection of the shards and pairs that are tried before a run."""

    @pytest.fixture(autouse=True)
    def folder(self, shard, tmp_path):
        """Return a folder for training shards."""
        shard.unlink()
        return tmp_path

    @pytest.fixture
    def look(self, folder):
        """Return a function that tries the pairs of training shards before a run."""
        return lambda name: preflight(config(f"{folder}/{name}", folder), RunFolder(folder), {})

    @pytest.fixture
    def indexed(self):
        """Yield a mock that records the training shards that are indexed because the cache has no index of them."""
        make = index.IndexCache._make
        with mock.patch.object(index.IndexCache, "_make", autospec=True, side_effect=make) as made:
            yield made

    def test_few_of_many_shards_are_indexed(self, folder, look, indexed):
        shards = [write_shard(folder / f"{number:02d}.tar", PAIRS) for number in range(10)]
        found = look("*.tar")
        assert [call.args[1] for call in indexed.call_args_list] == [str(shards[number]) for number in (0, 3, 6, 9)]
        assert (found.tried, found.unusable) == (16, [])
        look("*.tar")
        assert indexed.call_count == 4  # the cache has kept the indexes of the four shards

    def test_one_shard_that_is_elsewhere_is_brought_here(self, folder, indexed):
        write_shard(folder / "x.tar", PAIRS)
        name = f"pipe:cat {folder}/x.tar #{{0..9999}}2>/dev/null"
        assert preflight(config(name, folder), RunFolder(folder), {}).tried == 4
        assert indexed.call_count == 1

    def test_every_shard_of_them_is_read_and_bad_pairs_are_named(self, folder, look):
        for name, pairs in {"a": PAIRS, "b": changed(png=b"x"), "c": PAIRS}.items():
            write_shard(folder / f"{name}.tar", pairs)
        found = look("*.tar")
        assert found.tried == 12
        assert [line.partition(":")[0] for line in found.unusable] == [f"b.tar/00{number}" for number in (0, 2, 4, 7)]
        write_shard(folder / "x.tar", [*changed(png=b"x")[:4], *PAIRS])
        found = look("x.tar")
        assert [line.partition(":")[0] for line in found.unusable] == ["x.tar/000", "x.tar/003"]
        assert "4 pairs were tried, and 2 of them cannot be used: x.tar/000: not an image" in str(found)
