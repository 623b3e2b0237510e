"""Under which names the image and the captions of a sample are looked for, and which of several captions is drawn."""

import json
import random
import re
import shlex
from collections import Counter

import pytest

from clipfast.data import Keys, caption, expand_shards, open_shards, read_keys, read_separator
from clipfast.data.keys import IMAGE_KEYS, TEXT_KEYS
from clipfast.data.samples import image_bytes
from clipfast.images import SampleError
from clipfast.training import TrainConfig
from clipfast.training.data import validation_set

from .conftest import TINY, picture, run_command, sample, write_shard

FIVE = [f"caption {number}" for number in range(5)]


def packed(**members):
    """A sample with these members; what is no bytes is json."""
    return {key: value if isinstance(value, bytes) else json.dumps(value).encode() for key, value in members.items()}


@pytest.mark.parametrize(
    ("members", "flags", "expected"),
    [
        ({"txt": b" a \n", "json": {"caption": "b"}}, {}, "a"),
        ({"json": {"title": "c", "text": "b", "caption": "a"}}, {}, "a"),
        ({"json": {"title": "c", "text": "b", "caption": " "}}, {}, "b"),
        ({"json": {"title": "c", "text": None, "caption": 7}}, {}, "c"),
        ({"json": {"caption": ["", " b ", 7]}}, {}, "b"),
        ({"json": {"caption": [], "text": "b"}}, {}, "b"),
        ({"txt": b"a", "alt": b"b"}, {"text_key": "none; alt;txt"}, "b"),
        ({"txt": b"a", "json": {"alt": "b"}}, {"text_key": "alt"}, "b"),
        ({"txt": b"a", "json": {"caption": "b"}}, {"json_text_key": ["caption"]}, "b"),
        ({"txt": b"a", "json": {"long": "", "short": "b"}}, {"json_text_key": ["none;long", "short"]}, "b"),
        ({"txt": b"a", "json": {"x": "b"}}, {"json_text_key": ["x"], "text_key": "txt"}, "b"),
    ],
)
def test_which_caption_is_taken(members, flags, expected):
    for rng in (None, random.Random(0)):
        assert caption(packed(**members), rng=rng, keys=read_keys(**flags)) == expected


@pytest.mark.parametrize(
    ("members", "flags", "message"),
    [
        ({"txt": b" ", "json": {"caption": "b"}}, {}, "caption is empty"),
        ({"json": {"caption": [" "], "text": None}}, {}, "caption is empty"),
        ({"json": {"caption": 5, "text": None}}, {}, "caption is no text: 5"),
        ({"json": {"caption": ["", {"en": "a"}]}}, {}, "caption is no text: {'en': 'a'}"),
        (
            {"json": {}, "jpg": b"x"},
            {},
            r"no caption \(txt, caption, text, title\), only jpg, json with nothing; --text-k",
        ),
        (
            {"json": {"url": "u", "alt": "b"}, "jpg": b""},
            {},
            "only jpg, json with url, alt; --text-key names others",
        ),
        ({"txt": b"a"}, {"json_text_key": ["x"]}, r"sample has no caption \(x\), only txt \(a pair's files"),
        ({"json": b"{"}, {}, "json cannot be read"),
        ({"alt": b"\xff"}, {"text_key": "alt"}, "caption is not UTF-8"),
    ],
)
def test_no_caption(members, flags, message):
    with pytest.raises(SampleError, match=message):
        caption(packed(**members), keys=read_keys(**flags))


def test_which_image_is_taken():
    assert image_bytes({"png": b"a", "jpg": b"b", "image": b"c"}) == b"b"
    assert image_bytes({"json": b"{}", "image": b"c"}) == b"c"
    assert image_bytes({"png": b"a", "jpg": b"b"}, read_keys(image_key="webp; png;jpg")) == b"a"
    with pytest.raises(SampleError, match=r"no image \(webp\), only png, txt; --image-key names others"):
        image_bytes({"png": b"a", "txt": b""}, read_keys(image_key="webp"))
    # a path in the json of a tar file is only a text
    with pytest.raises(SampleError, match="only json with filepath"):
        image_bytes({"json": b'{"filepath": "/etc/passwd"}'})


def test_a_caption_needs_no_random_number_unless_there_are_several():
    """The random numbers of pairs with one text are those of the keywords alone, as they always were."""
    for members in ({"txt": b"a"}, {"json": {"caption": "a"}}, {"json": {"caption": ["a"]}}):
        rng = random.Random(1)
        caption(packed(**members), rng=rng)
        assert rng.random() == random.Random(1).random()


def test_one_of_several_captions_is_drawn():
    raw = packed(json={"caption": FIVE})
    assert caption(raw) == "caption 0"
    drawn = Counter(caption(raw, rng=random.Random(seed)) for seed in range(1000))
    assert set(drawn) == set(FIVE)
    assert min(drawn.values()) > 150


def test_keys_are_drawn_by_their_probabilities():
    raw = packed(json={"a": "a", "b": "b", "c": "c"})
    keys = read_keys(json_text_key=["a;b", "c"], json_text_key_probs=[3, 1])
    drawn = Counter(caption(raw, rng=random.Random(seed), keys=keys) for seed in range(1000))
    assert set(drawn) == {"a", "b"}
    assert 700 < drawn["a"] < 800
    assert caption(raw, keys=keys) == "a"
    # one with no probability takes the place of those that are not there
    left = packed(json={"b": "", "c": "c"})
    assert {caption(left, rng=random.Random(seed), keys=keys) for seed in range(20)} == {"c"}
    # what follows the first is drawn by the probabilities of the rest, as OpenCLIP draws it
    keys = read_keys(json_text_key=["none", "a", "b"], json_text_key_probs=[2, 1, 4])
    drawn = Counter(caption(raw, rng=random.Random(seed), keys=keys) for seed in range(1000))
    assert 750 < drawn["b"] < 850


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_key": " ; "}, "--image-key names no key: ' ; '"),
        ({"text_key": ""}, "--text-key names no key: ''"),
        ({"json_text_key": (";",)}, "--json-text-key names no key: ';'"),
        ({"json_text_key_probs": (1.0,)}, "--json-text-key-probs has 1 values for no --json-text-key"),
        (
            {"json_text_key": ("a;b",), "json_text_key_probs": (1.0,) * 3},
            "probs has 3 values for the 2 keys of --json-tex",
        ),
        (
            {"json_text_key": ("a",), "json_text_key_probs": (-1.0,)},
            "--json-text-key-probs must not be negative, got -1.0",
        ),
        ({"json_text_key": ("a",), "json_text_key_probs": (float("nan"),)}, "must not be negative, got nan"),
        ({"csv_separator": ", "}, "--csv-separator must be one ASCII character, or .t for a tab, got ', '"),
        ({"csv_separator": '"'}, "--csv-separator must be one ASCII character"),
        ({"csv_separator": "\n"}, "--csv-separator must be one ASCII character"),
        ({"csv_separator": ""}, "--csv-separator must be one ASCII character"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(train_data="x.tar", **flags)


def test_separators():
    assert [read_separator(text) for text in (None, "\\t", "\t", ";")] == [None, "\t", "\t", ";"]
    assert read_keys() == Keys()


def test_help_names_the_defaults(capsys):
    _, out, _ = run_command(capsys, "train", "--help")
    text = " ".join(out.split())
    for keys in (IMAGE_KEYS, TEXT_KEYS):
        assert f"(default: {', '.join(keys[:-1])} or {keys[-1]})" in text


def trained(capsys, tmp_path, name, *arguments):
    """Losses of two steps."""
    code, _, err = run_command(
        capsys, "train", "--model", TINY, "--batch-size", 8, "--epochs", 1, "--workers", 0, "--warmup", 1,
        "--logs", tmp_path, "--name", name, "--log-every-n-steps", 1, *arguments,
    )  # fmt: skip
    assert code == 0, err
    metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in metrics if "loss" in line]


def test_the_look_at_every_pair_that_is_suggested_reads_the_same_columns(capsys, tmp_path):
    (tmp_path / "7.png").write_bytes(sample(7)["png"])
    (tmp_path / "t.csv").write_text("view;the text;a,b,c,d\n7.png;seven;\n")
    flags = ["--csv-img-key", "view", "--csv-caption-key", "the text", "--csv-separator", ";"]
    _, out, _ = run_command(capsys, "index", tmp_path / "t.csv", *flags)
    suggested = shlex.split(out.splitlines()[-1].partition(": ")[2])
    assert re.search("ok +every pair", run_command(capsys, *suggested[1:])[1])


@pytest.mark.long
def test_flags_reach_training_evaluation_and_the_index(capsys, tmp_path):
    plain = [sample(index) for index in range(16)]
    named = [
        {"view": one["png"], "json": json.dumps({"alt": one["txt"].decode(), "kind": "x"}).encode()} for one in plain
    ]
    write_shard(tmp_path / "plain.tar", plain)
    write_shard(tmp_path / "named.tar", named)
    rows = "".join(f"{index:02}.png;{one['txt'].decode()};,\n" for index, one in enumerate(plain))
    (tmp_path / "t.csv").write_text("view;alt;a,b,c,d\n" + rows)
    for index, one in enumerate(plain):
        (tmp_path / f"{index:02}.png").write_bytes(one["png"])
    expected = trained(capsys, tmp_path, "plain", "--train-data", tmp_path / "plain.tar")
    assert len(expected) == 2
    keys = ["--image-key", "view", "--text-key", "alt"]
    for name, flags in {
        "named": ["--train-data", tmp_path / "named.tar", *keys, "--val-data", tmp_path / "named.tar"],
        "json": ["--train-data", tmp_path / "named.tar", "--csv-img-key", "view", "--json-text-key", "none", "alt"],
        "table": [
            "--train-data", tmp_path / "t.csv", "--csv-img-key", "view", "--csv-caption-key", "alt",
            "--csv-separator", ";", "--val-data", tmp_path / "t.csv",
        ],
    }.items():  # fmt: skip
        assert trained(capsys, tmp_path, name, *flags) == expected, name
    unique = trained(capsys, tmp_path, "unique", "--train-data", tmp_path / "plain.tar", "--unique-by", "caption")
    flags = ["--train-data", tmp_path / "named.tar", *keys, "--unique-by", "caption"]
    assert trained(capsys, tmp_path, "unique-named", *flags) == unique
    flags = [tmp_path / "t.csv", "--text-key", "alt", "--csv-separator", ";", "--unique-by", "caption"]
    code, out, _ = run_command(capsys, "index", *flags)
    assert code == 0
    assert "different  16" in out
    code, out, err = run_command(
        capsys, "eval", "zeroshot", "--model", f"local-dir:{tmp_path}/plain", "--data", tmp_path / "t.csv", *keys,
        "--csv-separator", ";",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["images"] == 16


def test_validation_data_may_have_the_usual_names(tmp_path):
    write_shard(tmp_path / "s.tar", [{"png": picture(0), "txt": b"a"}])
    write_shard(tmp_path / "t.tar", [{"view": picture(0), "alt": b"a", "png": b"x", "txt": b"b"}])
    for shard in "st":
        options = {"train_data": "x.csv", "image_key": "view", "text_key": "alt", "val_data": f"{tmp_path}/{shard}.tar"}
        assert [image.caption for image in validation_set(TrainConfig(**options))] == ["a"]


def test_a_position_always_draws_the_same_caption_and_passes_draw_all(tmp_path):
    from .tables import batches

    text = [{"png": picture(index), "json": json.dumps({"caption": FIVE}).encode()} for index in range(8)]
    write_shard(tmp_path / "s.tar", text)
    made, again = (batches(tmp_path / "s.tar") for _ in range(2))
    seen = Counter()
    for number in range(12):
        texts = [tuple(row.tolist()) for row in made[number].texts]
        assert texts == [tuple(row.tolist()) for row in again[number].texts]
        assert len(set(texts)) > 1
        seen.update(texts)
    assert len(seen) == 5


@pytest.mark.parametrize(("key", "content"), [("json", b'{"caption": "a"}'), ("caption", b"a"), ("text", b"a")])
def test_damage_is_counted_in_a_shard_with_captions_of_any_name(tmp_path, key, content):
    """Without a pair whose size is known, the smallest imaginable one would be taken, and far too many lost."""
    samples = [{"png": picture(index, 100), key: content} for index in range(20)]
    path = write_shard(tmp_path / "s.tar", samples)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 100_000] = random.Random(0).randbytes(100_000)
    path.write_bytes(data)
    source = open_shards(expand_shards(str(path)))
    assert 1 <= sum(source.shards[0].damage.values()) <= 5
