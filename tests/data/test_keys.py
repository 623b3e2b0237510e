"""Keys of the image and the captions of a sample, and the draw of one of several captions."""

import json
import random
import re
import shlex
from collections import Counter
from dataclasses import fields

import pytest
import torch

from clipfast import create_model, export_open_clip
from clipfast.cli import main as cli
from clipfast.data import Keys, caption, expand_shards, open_shards, read_keys, read_separator
from clipfast.data.samples import image_bytes
from clipfast.models.images import SampleError
from clipfast.models.tokenizer import Tokenizer
from clipfast.train import TrainConfig
from clipfast.train.data import TrainingData, validation_set

from ..small_runs import cases, picture, run_command, sample, write_shard
from .tables import batches, texts_of

FIVE = [f"caption {number}" for number in range(5)]


def packed(**members):
    """Return a sample whose members are given as bytes, as texts, or as objects to write as JSON."""
    return {
        key: value if isinstance(value, bytes)
        else value.encode("latin-1") if isinstance(value, str)
        else json.dumps(value).encode()
        for key, value in members.items()
    }  # fmt: skip


# Each line has a sample, the flags that name its keys, and the expected caption.
TAKEN = r"""
{"txt": " a \n", "json": {"caption": "b"}} | {} | a
{"json": {"title": "c", "text": "b", "caption": "a"}} | {} | a
{"json": {"title": "c", "text": "b", "caption": " "}} | {} | b
{"json": {"title": "c", "text": null, "caption": 7}} | {} | c
{"json": {"caption": ["", " b ", 7]}} | {} | b
{"json": {"caption": [], "text": "b"}} | {} | b
{"txt": "a", "alt": "b"} | {"text_key": "none; alt;txt"} | b
{"txt": "a", "json": {"alt": "b"}} | {"text_key": "alt"} | b
{"txt": "a", "json": {"caption": "b"}} | {"json_text_key": ["caption"]} | b
{"txt": "a", "json": {"long": "", "short": "b"}} | {"json_text_key": ["none;long", "short"]} | b
{"txt": "a", "json": {"x": "b"}} | {"json_text_key": ["x"], "text_key": "txt"} | b
"""
# Each line has a sample without a usable caption, flags, and a pattern of the error.
NOT_TAKEN = r"""
{"txt": " ", "json": {"caption": "b"}} | {} | caption is empty
{"json": {"caption": [" "], "text": null}} | {} | caption is empty
{"json": {"caption": 5, "text": null}} | {} | caption is no text: 5
{"json": {"caption": ["", {"en": "a"}]}} | {} | caption is no text: {'en': 'a'}
{"json": {}, "jpg": "x"} | {} | no caption \(txt, .*\), only jpg, json with nothing; --text-k
{"json": {"url": "u", "alt": "b"}, "jpg": ""} | {} | only jpg, json with url, alt; --text-key
{"txt": "a"} | {"json_text_key": ["x"]} | no caption \(x\), only txt
{"json": "{"} | {} | json cannot be read
{"alt": "\u00ff"} | {"text_key": "alt"} | caption is not UTF-8
"""


def samples(text):
    """Parametrise over the lines of a table: a sample's files, the flags that name its keys, and the result."""
    rows = [line.split(" | ") for line in text.strip().splitlines()]
    return pytest.mark.parametrize(
        ("raw", "keys", "expected"),
        [(packed(**json.loads(members)), read_keys(**json.loads(flags)), last) for members, flags, last in rows],
    )


@samples(TAKEN)
def test_which_caption_is_taken(raw, keys, expected):
    for rng in (None, random.Random(0)):
        assert caption(raw, rng=rng, keys=keys) == expected


@samples(NOT_TAKEN)
def test_no_caption(raw, keys, expected):
    with pytest.raises(SampleError, match=expected):
        caption(raw, keys=keys)


def test_which_image_is_taken():
    assert image_bytes({"png": b"a", "jpg": b"b", "image": b"c"}) == b"b"
    assert image_bytes({"json": b"{}", "image": b"c"}) == b"c"
    assert image_bytes({"png": b"a", "jpg": b"b"}, read_keys(image_key="webp; png;jpg")) == b"a"
    with pytest.raises(SampleError, match=r"no image \(webp\), only png, txt; --image-key names others"):
        image_bytes({"png": b"a", "txt": b""}, read_keys(image_key="webp"))
    # a path in a json of a tar shard is never read as a file
    with pytest.raises(SampleError, match="only json with filepath"):
        image_bytes({"json": b'{"filepath": "/etc/passwd"}'})


def drawn(raw, times=1000, **keys):
    """Count how often each caption of a sample is drawn."""
    return Counter(caption(raw, rng=random.Random(seed), **keys) for seed in range(times))


def test_one_of_several_captions_is_drawn():
    raw = packed(json={"caption": FIVE})
    assert caption(raw) == "caption 0"
    found = drawn(raw)
    assert set(found) == set(FIVE)
    assert min(found.values()) > 150


def test_keys_are_drawn_by_their_probabilities():
    raw = packed(json={"a": "a", "b": "b", "c": "c"})
    keys = read_keys(json_text_key=["a;b", "c"], json_text_key_probs=[3, 1])
    found = drawn(raw, keys=keys)
    assert set(found) == {"a", "b"}
    assert 700 < found["a"] < 800
    assert caption(raw, keys=keys) == "a"
    # A caption key with probability 0 is drawn if captions of the other keys are missing.
    assert set(drawn(packed(json={"b": "", "c": "c"}), 20, keys=keys)) == {"c"}
    # If the first key is missing, the other keys are drawn by their own probabilities, as in OpenCLIP.
    keys = read_keys(json_text_key=["none", "a", "b"], json_text_key_probs=[2, 1, 4])
    assert 750 < drawn(raw, keys=keys)["b"] < 850


@cases(r"""
image_key=;: --image-key names no key: ';'
text_key=: --text-key names no key: ''
json_text_key=(';',): --json-text-key names no key: ';'
json_text_key_probs=(1.0,): --json-text-key-probs has 1 values for no --json-text-key
json_text_key=('a;b',) json_text_key_probs=(1.0,1.0,1.0): probs has 3 values for the 2 keys of --json-tex
json_text_key=('a',) json_text_key_probs=(-1.0,): --json-text-key-probs must not be negative, got -1.0
json_text_key=('a',) json_text_key_probs=(1e999,): --json-text-key-probs must be a finite number, got inf
csv_separator=,,: --csv-separator must be one ASCII character, or .t for a tab, got ',,'
csv_separator=": --csv-separator must be one ASCII character
csv_separator='\n': --csv-separator must be one ASCII character
csv_separator=: --csv-separator must be one ASCII character
""")
def test_bad_flags(options, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(train_data="x.tar", **options)


def test_separators():
    assert [read_separator(text) for text in (None, "\\t", "\t", ";")] == [None, "\t", "\t", ";"]
    assert read_keys() == Keys()


def test_the_look_at_every_pair_that_is_suggested_reads_the_same_columns(capsys, tmp_path):
    (tmp_path / "7.png").write_bytes(sample(7)["png"])
    (tmp_path / "t.csv").write_text("view;the text;a,b,c,d\n7.png;seven;\n")
    flags = ["--csv-img-key", "view", "--csv-caption-key", "the text", "--csv-separator", ";"]
    _, out, _ = run_command(capsys, "index", tmp_path / "t.csv", *flags)
    suggested = shlex.split(out.splitlines()[-1].partition(": ")[2])
    assert re.search("ok +every pair", run_command(capsys, *suggested[1:])[1])


def test_flags_reach_training_evaluation_and_the_index(capsys, tmp_path, monkeypatch):
    model = create_model("ViT-T-8-32")

    def first_batch(flags):
        """Return the first batch of ``clipfast train`` with these flags, which name the keys of images and captions."""
        words = f"train --batch-size 8 --epochs 1 --workers 0 --train-data {flags}".split()
        given = vars(cli._parser("train").parse_args(words))
        config = TrainConfig(**{field.name: given[field.name] for field in fields(TrainConfig) if field.name in given})
        return next(TrainingData(config).batches(0, model, Tokenizer(16), pin_memory=False))

    monkeypatch.chdir(tmp_path)
    plain = [sample(index) for index in range(16)]
    write_shard(tmp_path / "plain.tar", plain)
    write_shard(tmp_path / "named.tar", [packed(view=one["png"], json={"alt": one["txt"].decode()}) for one in plain])
    rows = "".join(f"{index:02}.png;{one['txt'].decode()};,\n" for index, one in enumerate(plain))
    (tmp_path / "t.csv").write_text("view;alt;a,b,c,d\n" + rows)
    for index, one in enumerate(plain):
        (tmp_path / f"{index:02}.png").write_bytes(one["png"])
    for unique in ("", " --unique-by caption"):
        expected = first_batch(f"plain.tar{unique}")
        for flags in (
            "named.tar --image-key view --text-key alt",
            "t.csv --csv-img-key view --csv-caption-key alt --csv-separator ;",
        ):
            found = first_batch(flags + unique)
            assert torch.equal(found.images, expected.images), flags
            assert torch.equal(found.texts, expected.texts), flags
    export_open_clip(model, tmp_path / "model")
    named = ["--text-key", "alt", "--csv-separator", ";"]
    code, out, _ = run_command(capsys, "index", "t.csv", *named, "--unique-by", "caption")
    assert (code, "different  16" in out) == (0, True)
    options = ["--model", f"local-dir:{tmp_path}/model", "--data", "t.csv", "--image-key", "view"]
    code, out, _ = run_command(capsys, "eval", "zeroshot", *options, *named)
    assert (code, json.loads(out)["images"]) == (0, 16)


def test_validation_data_may_have_the_usual_names(tmp_path):
    write_shard(tmp_path / "s.tar", [{"png": picture(0), "txt": b"a"}])
    write_shard(tmp_path / "t.tar", [{"view": picture(0), "alt": b"a", "png": b"x", "txt": b"b"}])
    for shard in "st":
        options = {"train_data": "x.csv", "image_key": "view", "text_key": "alt", "val_data": f"{tmp_path}/{shard}.tar"}
        assert [image.caption for image in validation_set(TrainConfig(**options))] == ["a"]


def test_a_position_always_draws_the_same_caption_and_passes_draw_all(tmp_path):
    text = [{"png": picture(index), "json": json.dumps({"caption": FIVE}).encode()} for index in range(8)]
    write_shard(tmp_path / "s.tar", text)
    made, again = (batches(tmp_path / "s.tar") for _ in range(2))
    seen = Counter()
    for number in range(12):
        texts = texts_of(made[number])
        assert texts == texts_of(again[number])
        assert len(set(texts)) > 1
        seen.update(texts)
    assert len(seen) == 5


@pytest.mark.parametrize(("key", "content"), [("json", b'{"caption": "a"}'), ("caption", b"a"), ("text", b"a")])
def test_damage_is_counted_in_a_shard_with_captions_of_any_name(tmp_path, key, content):
    """Lost pairs are estimated by the size of readable pairs, so pairs must be known under any name of the caption."""
    samples = [{"png": picture(index, 100), key: content} for index in range(20)]
    path = write_shard(tmp_path / "s.tar", samples)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 100_000] = random.Random(0).randbytes(100_000)
    path.write_bytes(data)
    source = open_shards(expand_shards(str(path)))
    assert 1 <= sum(source.shards[0].damage.values()) <= 5
