"""Test tokenizers from files: they give the ids of HFTokenizer (OpenCLIP) and transformers, and refuse wrong files."""

import dataclasses
import json
import pickle
import sys

import pytest
import torch

from clipfast import create_model, export_open_clip, get_tokenizer
from clipfast.models import SigLIP
from clipfast.models.file_tokenizer import FileTokenizer, tokenizer_of

from .siglip import CONFIGS, make_model, save_tokenizer

pytest.importorskip("tokenizers")

TEXTS = [
    "", " ", "a photo of a cat", "A Photo of the RED_thing!", "it's two o'clock; état über", "猫 and 😀 and 🏳️‍🌈",
    "very long " * 40, "x" * 300, "\t tabs\nand lines \r\n", "&lt;b&gt; caf\u00c3\u00a9 &amp;amp;", "</s>",
    "<eos> <pad> a", "...!?", "0 1 2 3", "\u200b\ufeff\u0301", "İstanbul ẞ",
]  # fmt: skip


@pytest.fixture(scope="module", params=["t5", "gemma"])
def folder(request, tmp_path_factory):
    """Return a folder with the files of a SigLIP tokenizer."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / request.param, request.param)


@pytest.mark.parametrize(("clean", "length"), [("canonicalize", 2), ("lower", 12), ("whitespace", 64)])
def test_ids_are_those_of_open_clip(folder, clean, length):
    pytest.importorskip("transformers")
    theirs = pytest.importorskip("open_clip.tokenizer").HFTokenizer(str(folder), context_length=length, clean=clean)
    ours = FileTokenizer(folder, length, clean)
    assert ours.pad_token_id == theirs.tokenizer.pad_token_id == (1 if folder.name == "t5" else 0)
    ids = ours(TEXTS)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, theirs(TEXTS))
    assert torch.equal(ours(TEXTS[3]), theirs(TEXTS[3]))
    # A text that is cut still ends with the end token (id 1), and no call changes the ids of later calls.
    assert (ids[6, -1], ids[7, -1]) == (1, 1)
    assert torch.equal(ours(TEXTS), ids)
    assert torch.equal(ours(TEXTS, context_length=20), theirs(TEXTS, context_length=20))


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_transformers_own_classes_save(folder, side, tmp_path):
    """FileTokenizer reads the files that transformers' tokenizer classes of SigLIP save, made from a vocabulary."""
    transformers = pytest.importorskip("transformers")
    theirs = pytest.importorskip("open_clip.tokenizer").HFTokenizer
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    if folder.name == "t5":
        vocab = [tuple(entry) for entry in model["vocab"]]
        own = transformers.T5TokenizerFast(vocab=vocab, extra_ids=0, pad_token="</s>", padding_side=side)
    else:
        merges = [tuple(merge) for merge in model["merges"]]
        own = transformers.GemmaTokenizerFast(
            vocab=model["vocab"], merges=merges, add_bos_token=False, add_eos_token=True, padding_side=side
        )
    own.save_pretrained(tmp_path / "own")
    ids = FileTokenizer(tmp_path / "own", 16)(TEXTS)
    assert torch.equal(ids, theirs(str(tmp_path / "own"), context_length=16, clean="canonicalize")(TEXTS))
    assert (ids[0, 0] == 1) == (side == "right" or folder.name == "t5")


def test_texts_come_back_and_other_processes_get_it(folder):
    tokenizer = FileTokenizer(folder)
    assert tokenizer.decode(tokenizer("A red cat!")[0]).strip() == "a red cat"
    assert tokenizer.decode(tokenizer.encode("a red cat")).strip() == "a red cat"
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(TEXTS), tokenizer(TEXTS))


def test_padding_where_no_file_says_it(folder, tmp_path):
    path = tmp_path / "own-name.json"
    path.write_text((folder / "tokenizer.json").read_text())
    assert FileTokenizer(path, pad_id=7)("a")[0, -1] == 7
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<unk>"}}))
    assert FileTokenizer(path).pad_token_id == FileTokenizer(path)._tokenizer.token_to_id("<unk>")


def test_saved_files_are_read_by_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "x.json").write_text((folder / "tokenizer.json").read_text())
    for source, name in ((folder, "all"), (alone / "x.json", "one")):
        tokenizer = FileTokenizer(source, 12, pad_id=1 if folder.name == "t5" else 0)
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        texts = ["a red cat", "two dogs " * 30]
        ids = theirs(texts, max_length=12, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(ids, tokenizer(texts))


def test_get_tokenizer(folder, tmp_path):
    with pytest.raises(ValueError, match=r"needs the file tokenizer.json .* repository timm/ViT-B-16-SigLIP"):
        get_tokenizer("ViT-B-16-SigLIP")
    tokenizer = get_tokenizer("ViT-B-16-SigLIP", tokenizer_file=folder)
    assert (tokenizer.context_length, tokenizer.clean) == (64, "canonicalize")
    assert tokenizer("a").shape == (1, 64)
    assert get_tokenizer("ViT-B-16-SigLIP", 20, tokenizer_file=folder / "tokenizer.json")("a").shape == (1, 20)
    with pytest.raises(ValueError, match="ViT-B-32 has CLIP's tokenizer, which needs no file"):
        get_tokenizer("ViT-B-32", tokenizer_file=folder)


def test_a_folder_brings_its_tokenizer(folder, tmp_path):
    export_open_clip(make_model(CONFIGS["mixed"]), tmp_path / "model")
    name = f"local-dir:{tmp_path}/model"
    with pytest.raises(ValueError, match="that of the Hugging Face repository some/repo, which"):
        get_tokenizer(name)
    FileTokenizer(folder).save(tmp_path / "model")
    assert torch.equal(get_tokenizer(name)(TEXTS), get_tokenizer(name, tokenizer_file=folder)(TEXTS))
    open_clip = pytest.importorskip("open_clip")
    assert torch.equal(get_tokenizer(name)(TEXTS), open_clip.get_tokenizer(name)(TEXTS))
    assert isinstance(create_model(name), SigLIP)


def test_wrong_files_and_arguments(folder, tmp_path, monkeypatch):
    (tmp_path / "text.json").write_text("{}")
    for make, message in (
        (lambda: FileTokenizer(tmp_path / "none.json"), "there is no tokenizer at .*none.json"),
        (lambda: FileTokenizer(tmp_path / "text.json"), "text.json is not a file of the tokenizers package"),
        (lambda: FileTokenizer(folder, clean="soap"), "clean must be one of canonicalize, lower, whitespace"),
        (lambda: FileTokenizer(folder, 1), r"must hold the 1 special token\(s\) and at least one more, got 1"),
        (lambda: FileTokenizer(folder, 8)("a " * 30, truncate=False), "tokens, 8 fit: 'a a"),
        (
            lambda: tokenizer_of(CONFIGS["bare"], "bare", None, None),
            "bare needs the file tokenizer.json of its tokenizer, which clipfast does not ship",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    small = CONFIGS["exact"]
    config = dataclasses.replace(small, text=dataclasses.replace(small.text, vocab_size=50))
    with pytest.raises(ValueError, match="tokens, and tiny knows only 50: it is not the one"):
        tokenizer_of(config, "tiny", folder, None)
    with pytest.raises(TypeError, match="tokenizer: text must be a string, got int: 3"):
        FileTokenizer(folder)(["a", 3])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'clipfast\[siglip\]'"):
        FileTokenizer(folder)
