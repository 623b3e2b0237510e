"""``clipfast eval compositional``: every data format, HTML pages, several ranks, and wrong inputs."""

import json
import re

import pytest

from ..small_runs import write_shard
from .benchmark_sets import solid
from .eval_commands import check_page, check_refused, evaluated, printed, split, wrong_inputs

HOSTILE = "<script>alert('x')</script>&"


def evaluate(capsys, data, *more):
    """Run ``clipfast eval compositional``, and return its results and its stderr."""
    out, err = printed(capsys, "compositional", "--model", "perfect", "--data", data, *more)
    return json.loads(out), err


def accuracies(found, group):
    """Return the compositional accuracy of each group when cases are grouped by ``group``."""
    return {name: part["metrics"]["acc"] for name, part in found["groups"][group].items()}


def counted(found):
    """Return the format and the counts (cases, left-out cases, skipped images) in compositional results."""
    return found["format"], found["cases"], found["left_out_cases"], found["skipped_images"]


def write_aro(folder):
    """Write ARO's compositional records: boxes of one colour in an image; the third record's captions are exchanged."""
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "1.png").write_bytes(solid("red", "blue"))
    records = []
    for left, right, wrong in ((0, "red", "blue"), (16, "blue", "red"), (16, "red", "blue")):
        box = {"bbox_x": left, "bbox_y": 0, "bbox_w": 16, "bbox_h": 16}
        texts = {"true_caption": f"the {right}", "false_caption": f"the {wrong}"}
        records.append({"image_id": 1, "image_path": "1.png", **box, **texts, "relation_name": f"to the {right}"})
    (folder / "visual_genome_relation.json").write_text(json.dumps(records))
    return folder / "visual_genome_relation.json"


def test_aro(by_colour, tmp_path, capsys):
    path = write_aro(tmp_path)
    for data in (path, tmp_path):
        found, _ = evaluate(capsys, data)
        assert found["format"] == "aro"
        assert found["metrics"] == {"acc": pytest.approx(2 / 3), "mean_acc": 0.75}
        assert found["chance"] == {"acc": 0.5, "mean_acc": 0.5}
        assert accuracies(found, "relation_name") == {"to the blue": 1.0, "to the red": 0.5}


def test_the_mean_over_attributes_needs_25_cases_of_each(by_colour, tmp_path, capsys):
    (tmp_path / "1.png").write_bytes(solid("red"))
    keys = ("image_path", "true_caption", "false_caption", "attributes")
    rows = [("1.png", "red", "blue", ["old", "new"])] * 25 + [("1.png", "blue", "red", ["big", "small"])] * 5
    records = [dict(zip(keys, row, strict=True)) for row in rows]
    (tmp_path / "visual_genome_attribution.json").write_text(json.dumps(records))
    found, _ = evaluate(capsys, tmp_path)
    assert found["metrics"] == {"acc": pytest.approx(25 / 30), "mean_acc": 1.0}
    assert list(found["groups"]["attributes"]) == ["old, new", "big, small"]


def write_sugar_crepe(folder):
    """Write SugarCrepe's compositional records: two categories share an image, and one record names a missing file."""
    (folder / "val2017").mkdir(parents=True)
    for name in ("red", "green"):
        (folder / "val2017" / f"{name}.png").write_bytes(solid(name))
    categories = {
        "add_att": [("red", "red", "green")],
        "swap_obj": [("red", "blue", "red"), ("green", "green", "red"), ("gone", "red", "green")],
    }
    for name, rows in categories.items():
        records = {
            str(7 * number): {"filename": f"{image}.png", "caption": f"a {right}", "negative_caption": f"a {wrong}"}
            for number, (image, right, wrong) in enumerate(rows)
        }
        (folder / f"{name}.json").write_text(json.dumps(records))


def test_sugar_crepe(by_colour, tmp_path, capsys):
    write_sugar_crepe(tmp_path)
    found, err = evaluate(capsys, tmp_path)
    assert counted(found) == ("sugarcrepe", 3, 1, 1)
    assert "swap_obj.json, record 2" in err
    assert accuracies(found, "category") == {"add_att": 1.0, "swap_obj": 0.5}
    assert found["metrics"]["mean_acc"] == 0.75
    alone, _ = evaluate(capsys, tmp_path / "add_att.json", "--images", tmp_path / "val2017")
    assert alone["metrics"]["acc"] == 1.0


EXAMPLES = [
    {"image_0": "a", "image_1": "b", "caption_0": "now red", "caption_1": "now blue", "collapsed_tag": "Object"},
    {"image_0": "a", "image_1": "b", "caption_0": "now blue", "caption_1": "now red", "collapsed_tag": "Relation"},
]  # fmt: skip
KINDS = ("text_acc", "image_acc", "acc")


def check_winoground(found):
    """Check the compositional results on the examples in Winoground's format."""
    parts = found["groups"]["collapsed_tag"]
    assert {name: part["metrics"] for name, part in parts.items()} == {
        "Object": dict.fromkeys(KINDS, 1.0), "Relation": dict.fromkeys(KINDS, 0.0)
    }  # fmt: skip
    assert found["metrics"] == dict.fromkeys((*KINDS, "mean_acc"), 0.5)
    assert found["groups"]["tag"]["T"]["cases"] == 2
    assert found["chance"]["acc"] == 1 / 6


def write_winoground(folder):
    """Write Winoground's compositional records: two examples, in the second of which the captions are exchanged."""
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(solid("red"))
    (folder / "images" / "b.png").write_bytes(solid("blue"))
    (folder / "examples.jsonl").write_text("".join(json.dumps(x | {"tag": "T"}) + "\n" for x in EXAMPLES))


def test_winoground(by_colour, tmp_path, capsys):
    write_winoground(tmp_path)
    check_winoground(evaluate(capsys, tmp_path)[0])
    check_winoground(evaluate(capsys, tmp_path / "examples.jsonl")[0])


def test_winoground_as_hugging_face_has_it(by_colour, tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures = {name: {"bytes": solid(colour), "path": f"{name}.png"} for name, colour in (("a", "red"), ("b", "blue"))}
    rows = [x | {key: pictures[x[key]] for key in ("image_0", "image_1")} | {"tag": "T"} for x in EXAMPLES]
    broken = rows[0] | {"image_1": {"bytes": b"broken", "path": "b.png"}}
    parquet.write_table(pyarrow.Table.from_pylist([*rows, broken]), tmp_path / "test.parquet")
    found, _ = evaluate(capsys, tmp_path / "test.parquet")
    check_winoground(found)
    assert counted(found) == ("winoground", 2, 1, 1)


def pairs():
    """Return compositional pairs: a perfect model is right on two and wrong on one, and one has a broken image."""
    rows = [("red", ["blue", "green"], HOSTILE), ("green", "blue", "y"), ("blue", "a blue", "z"), ("red", "green", "x")]
    texts = [{"caption": right, "negative_caption": wrong, "of": group} for right, wrong, group in rows]
    pictures = [*(solid(right) for right, _, _ in rows[:3]), b"broken"]
    return [{"png": png, "json": json.dumps(text).encode()} for png, text in zip(pictures, texts, strict=True)]


def test_pairs_with_wrong_captions(by_colour, tmp_path, capsys):
    data = write_shard(tmp_path / "a.tar", pairs())
    found, err = evaluate(capsys, data, "--group-by", "of", "--html", tmp_path / "p.html")
    assert counted(found) == ("pairs", 3, 1, 1)
    assert accuracies(found, "of") == {HOSTILE: 1, "y": 1, "z": 0}
    page = (tmp_path / "p.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page
    assert found["chance"]["acc"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert "left out a.tar/003" in err
    for name in ("red", "green"):
        (tmp_path / f"{name}.png").write_bytes(solid(name))
    (tmp_path / "t.csv").write_text("filepath,title,negative_caption\nred.png,red,blue\ngreen.png,green,green too\n")
    (tmp_path / "t.jsonl").write_text('{"image": "red.png", "caption": "red", "false_caption": "blue"}')
    for name, share in (("t.csv", 0.5), ("t.jsonl", 1.0)):
        assert evaluate(capsys, tmp_path / name)[0]["metrics"] == {"acc": share}


def test_order(by_colour, tmp_path, capsys):
    """The model sees only the last colour that a caption names, which a shuffle within trigrams never changes."""
    (tmp_path / "red.png").write_bytes(solid("red"))
    records = [{"image": "red.png", "caption": ["one two blue red three four", "blue it is red"]}]
    (tmp_path / "coco_karpathy_test.json").write_text(json.dumps(records))
    found, _ = evaluate(capsys, tmp_path)
    assert (found["format"], found["cases"], found["chance"]["acc"]) == ("order", 2, 0.25)
    kinds = accuracies(found, "order of words")
    assert list(kinds) == ["all words", "trigrams", "within trigrams"]
    assert (kinds["trigrams"], kinds["within trigrams"]) == (1.0, 0.0)
    data = write_shard(tmp_path / "a.tar", [{"png": solid("red"), "txt": b"blue then red, and so on"}])
    assert evaluate(capsys, data, "--format", "order")[0]["cases"] == 1


@pytest.mark.long
def test_the_command_on_scenes(model, tmp_path, capsys, monkeypatch):
    given = ["compositional", *model, "--data", "shapes:48@5", "--features", tmp_path / "f"]
    outputs = split("--json {at}/r.json --html {at}/p.html --plot {at}/p.png --table", at=tmp_path)
    out, _ = printed(capsys, *given, *outputs)
    found = json.loads((tmp_path / "r.json").read_text())
    kinds = found["groups"]["kind"]
    assert [part["cases"] for part in kinds.values()] == [8] * 6
    assert sum(part["cases"] for part in found["groups"]["relation"].values()) == 8
    assert "kind: binding" in out
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "p.html").read_text()
    check_page(page, 36, 64)
    for name, part in kinds.items():
        assert re.search(rf"<h2>kind: {name}</h2>.*?{part['metrics']['acc']:.1%} \(", page, re.DOTALL)
    # The stored features suffice: nothing is encoded again.
    monkeypatch.setattr("clipfast.evaluate.encoder.Encoder.images", None)
    monkeypatch.setattr("clipfast.evaluate.encoder.encode_texts", None)
    assert evaluated(capsys, *given) == found


RECORD = {"filename": "x.png", "caption": "y", "negative_caption": "z"}
BOX = {"image_path": "x", "true_caption": "y", "false_caption": "z", "bbox_x": "1"}
FILES = {
    "half": "{", "empty": "[]", "number": "[3]", "keys": '[{"x": 1}]', "record": [RECORD], "box": [BOX],
    "lacking": [RECORD, {"filename": "x"}], "blank": [RECORD | {"negative_caption": " "}],
    "none": [RECORD | {"negative_caption": []}], "add_x": [RECORD],
    "visual_genome_x": [BOX],
}  # fmt: skip
WRONG = {
    "{tmp}/red.tar": "has no wrong captions: none of negative_caption",
    "{tmp}/red.tar --format aro": "--format aro is for files of",
    "{tmp}/red.tar --format order": "not one case can be made of",
    "{tmp}/pair.tar --images .": "--images is for files",
    "shapes:many": "'shapes:many' is neither shapes:N nor shapes:N@SEED",
    "{tmp}": "holds files of several formats: add_x.json (sugarcrepe)",
    "{tmp}/half.json": "half.json cannot be read as JSON: ",
    "{tmp}/empty.json": "empty.json holds no records",
    "{tmp}/number.json": "record 0 of {tmp}/number.json is no object but 3",
    "{tmp}/keys.json": "has the keys of no known format: winoground has ",
    "{tmp}/lacking.json": "record 1 of {tmp}/lacking.json has no 'caption'",
    "{tmp}/blank.json": "record 0 of {tmp}/blank.json has no text as 'negative_caption' but ' '",
    "{tmp}/none.json": "record 0 of {tmp}/none.json has no text as 'negative_caption' but []",
    "{tmp}/box.json": "record 0 of {tmp}/box.json has no numbers in bbox_x, ",
    "{tmp}/record.json --images nowhere": "--images nowhere: there is no such folder",
    # This list of shards is longer than the name of a file may be.
    "::".join(f"{number}.tar" for number in range(2000)): "no such shard: 0.tar",
}


@wrong_inputs(WRONG)
def test_wrong_inputs(words, message, by_colour, tmp_path, capsys):
    for name, content in FILES.items():
        (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    for name, text in (("red", b'{"caption": "red"}'), ("pair", b'{"caption": "a", "negative_caption": "b"}')):
        write_shard(tmp_path / f"{name}.tar", [{"png": solid("red"), "json": text}])
    check_refused(capsys, tmp_path, message, "compositional", "--model", "perfect", words=f"--data {words}")


def test_a_box_that_cannot_be_cut_out_is_named(by_colour, tmp_path, capsys):
    path = write_aro(tmp_path)
    records = json.loads(path.read_text())
    records[0]["bbox_w"], records[1]["bbox_h"] = 0, 1e9
    records += [records[2] | {"bbox_x": float(value)} for value in ("nan", "inf", "-1e300")]
    path.write_text(json.dumps(records))
    found, err = evaluate(capsys, path)
    assert counted(found) == ("aro", 1, 5, 5)
    assert "left out 1.png: the box of 0x16 pixels at 0, 0 cannot be cut out" in err
