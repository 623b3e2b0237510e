"""``clipfast eval compositional``: every format from its files, pages, ranks, and wrong inputs."""

import base64
import contextlib
import io
import json
import os
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipfast import create_model, ranks
from clipfast.cli import main
from clipfast.evaluation.encoder import Encoder
from clipfast.evaluation.tasks.compositional_records import files_of
from clipfast.images import make_transform
from clipfast.ranks import run_ranks

from .conftest import run_command, write_shard

ranks.PRELOAD.append("clipfast.evaluation.encoder")
COLOURS = {"red": (250, 5, 5), "green": (5, 250, 5), "blue": (5, 5, 250), "white": (250, 250, 250)}
HOSTILE = "<script>alert('x')</script>&"


def solid(*colours, size=16):
    """A picture of stripes of colours, as bytes of a PNG file."""
    image = Image.new("RGB", (size * len(colours), size))
    for place, colour in enumerate(colours):
        image.paste(COLOURS[colour], (place * size, 0, (place + 1) * size, size))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


class Seeing(Encoder):
    """A model that knows colours: a caption is like an image if the last colour that it names is the image's mean."""

    def images(self, pixels):
        return F.normalize(pixels.float().mean((2, 3)) - 127, dim=-1)

    def texts(self, texts, store=None, world=None):
        last = [[word for word in text.split() if word in COLOURS] for text in texts]
        rows = [COLOURS[words[-1]] if words else (9, 90, 30) for words in last]
        return F.normalize(torch.tensor(rows).float() - 127, dim=-1)


@pytest.fixture
def seeing(monkeypatch):
    tokenizer = lambda texts: torch.zeros(len(texts), 1)  # noqa: E731
    encoder = Seeing("seeing", torch.nn.Identity(), tokenizer, make_transform(8, uint8=True))
    monkeypatch.setattr(Encoder, "load", classmethod(lambda *args, **options: encoder))


def evaluate(capsys, data, *arguments):
    code, out, err = run_command(capsys, "eval", "compositional", "--model", "seeing", "--data", data, *arguments)
    assert code == 0, err
    return json.loads(out), err


def write_aro(folder):
    """Boxes of two images of two colours each; the third record is wrong for a model that sees."""
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "1.png").write_bytes(solid("red", "blue"))
    records = []
    for left, right, wrong in ((0, "red", "blue"), (16, "blue", "red"), (16, "red", "blue")):
        box = {"bbox_x": left, "bbox_y": 0, "bbox_w": 16, "bbox_h": 16}
        texts = {"true_caption": f"the {right}", "false_caption": f"the {wrong}"}
        records.append({"image_id": 1, "image_path": "1.png", **box, **texts, "relation_name": f"to the {right}"})
    (folder / "visual_genome_relation.json").write_text(json.dumps(records))
    return folder / "visual_genome_relation.json"


def test_aro(seeing, tmp_path, capsys):
    path = write_aro(tmp_path)
    for data in (path, tmp_path):
        found, _ = evaluate(capsys, data)
        assert (found["format"], found["cases"], found["task"]) == ("aro", 3, "image_caption_selection")
        assert found["metrics"] == {"acc": pytest.approx(2 / 3), "mean_acc": 0.75}
        assert found["chance"] == {"acc": 0.5, "mean_acc": 0.5}
    groups = found["groups"]["relation_name"]
    assert {name: (x["cases"], x["metrics"]["acc"]) for name, x in groups.items()} == {
        "to the blue": (1, 1.0),
        "to the red": (2, 0.5),
    }


def test_the_mean_over_attributes_needs_25_cases_of_each(seeing, tmp_path, capsys):
    (tmp_path / "1.png").write_bytes(solid("red"))
    records = []
    for number in range(30):
        texts = ("red", "blue") if number < 25 else ("blue", "red")
        attributes = ["old", "new"] if number < 25 else ["big", "small"]
        records.append(
            {"image_path": "1.png", "true_caption": texts[0], "false_caption": texts[1], "attributes": attributes}
        )
    (tmp_path / "visual_genome_attribution.json").write_text(json.dumps(records))
    found, _ = evaluate(capsys, tmp_path)
    assert found["metrics"] == {"acc": pytest.approx(25 / 30), "mean_acc": 1.0}
    assert list(found["groups"]["attributes"]) == ["old, new", "big, small"]


def write_sugar_crepe(folder):
    """Two categories that share an image, of which one record names a file that is missing."""
    (folder / "val2017").mkdir(parents=True)
    for name in ("red", "green"):
        (folder / "val2017" / f"{name}.png").write_bytes(solid(name))
    categories = {"add_att": [("red", "red", "green")], "swap_obj": [("red", "blue", "red"), ("green", "green", "red")]}
    for name, rows in categories.items():
        rows = [*rows, ("gone", "red", "green")] if name == "swap_obj" else rows
        records = {
            str(7 * number): {"filename": f"{image}.png", "caption": f"a {right}", "negative_caption": f"a {wrong}"}
            for number, (image, right, wrong) in enumerate(rows)
        }
        (folder / f"{name}.json").write_text(json.dumps(records))


def test_sugar_crepe(seeing, tmp_path, capsys):
    write_sugar_crepe(tmp_path)
    found, err = evaluate(capsys, tmp_path)
    assert (found["format"], found["cases"], found["left_out_cases"], found["skipped_images"]) == (
        "sugarcrepe",
        3,
        1,
        1,
    )
    assert "left out gone.png: " in err
    assert "left out 1 cases, as their images cannot be used: swap_obj.json, record 2" in err
    categories = found["groups"]["category"]
    assert {name: x["metrics"]["acc"] for name, x in categories.items()} == {"add_att": 1.0, "swap_obj": 0.5}
    assert found["metrics"]["mean_acc"] == 0.75
    alone, _ = evaluate(capsys, tmp_path / "add_att.json", "--images", tmp_path / "val2017")
    assert alone["metrics"]["acc"] == 1.0


EXAMPLES = [
    {"image_0": "a", "image_1": "b", "caption_0": "now red", "caption_1": "now blue", "collapsed_tag": "Object"},
    {"image_0": "a", "image_1": "b", "caption_0": "now blue", "caption_1": "now red", "collapsed_tag": "Relation"},
]  # fmt: skip
WINOGROUND = {
    "Object": {"text_acc": 1.0, "image_acc": 1.0, "acc": 1.0},
    "Relation": {"text_acc": 0.0, "image_acc": 0.0, "acc": 0.0},
}


def write_winoground(folder):
    """Two examples, of which the second is wrong for a model that sees."""
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(solid("red"))
    (folder / "images" / "b.png").write_bytes(solid("blue"))
    (folder / "examples.jsonl").write_text("".join(json.dumps(x | {"tag": "T"}) + "\n" for x in EXAMPLES))


def test_winoground(seeing, tmp_path, capsys):
    write_winoground(tmp_path)
    for data in (tmp_path, tmp_path / "examples.jsonl"):
        found, _ = evaluate(capsys, data)
        assert {name: x["metrics"] for name, x in found["groups"]["collapsed_tag"].items()} == WINOGROUND
        assert found["groups"]["tag"]["T"]["cases"] == 2
        assert found["metrics"] == {"text_acc": 0.5, "image_acc": 0.5, "acc": 0.5, "mean_acc": 0.5}
        assert found["chance"]["acc"] == 1 / 6


def test_winoground_as_hugging_face_has_it(seeing, tmp_path, capsys):
    import pyarrow
    from pyarrow.parquet import write_table

    pictures = {"a": {"bytes": solid("red"), "path": "a.png"}, "b": {"bytes": solid("blue"), "path": "b.png"}}
    rows = [x | {"image_0": pictures[x["image_0"]], "image_1": pictures[x["image_1"]], "tag": "T"} for x in EXAMPLES]
    broken = rows[0] | {"image_1": {"bytes": b"broken", "path": "b.png"}}
    write_table(pyarrow.Table.from_pylist([*rows, broken]), tmp_path / "test.parquet")
    found, _ = evaluate(capsys, tmp_path / "test.parquet")
    assert {name: x["metrics"] for name, x in found["groups"]["collapsed_tag"].items()} == WINOGROUND
    assert (found["cases"], found["left_out_cases"], found["skipped_images"]) == (2, 1, 1)


def pairs():
    """Two right for a model that sees, one wrong, and one broken."""
    rows = [("red", ["blue", "green"]), ("green", "blue"), ("blue", "a blue")]
    return [
        {
            "png": solid(colour),
            "json": json.dumps({"caption": colour, "negative_caption": wrong, "of": "xyz"[n]}).encode(),
        }
        for n, (colour, wrong) in enumerate(rows)
    ] + [{"png": b"broken", "json": b'{"caption": "red", "negative_caption": "green", "of": "x"}'}]


def test_pairs_with_wrong_captions(seeing, tmp_path, capsys):
    data = write_shard(tmp_path / "a.tar", pairs())
    found, err = evaluate(capsys, data, "--group-by", "of")
    assert (found["format"], found["cases"], found["left_out_cases"], found["skipped_images"]) == ("pairs", 3, 1, 1)
    assert {name: x["metrics"]["acc"] for name, x in found["groups"]["of"].items()} == {"x": 1, "y": 1, "z": 0}
    assert found["chance"]["acc"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert "left out a.tar/003: not an image" in err
    for name in ("red", "green"):
        (tmp_path / f"{name}.png").write_bytes(solid(name))
    (tmp_path / "t.csv").write_text("filepath,title,negative_caption\nred.png,red,blue\ngreen.png,green,green too\n")
    lines = [{"image": "red.png", "caption": "red", "false_caption": "blue"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, share in (("t.csv", 0.5), ("t.jsonl", 1.0)):
        assert evaluate(capsys, tmp_path / name)[0]["metrics"] == {"acc": share}


def test_order(seeing, tmp_path, capsys):
    """The model looks at the last colour alone: shuffles within trigrams never change which that is."""
    (tmp_path / "red.png").write_bytes(solid("red"))
    records = [{"image": "red.png", "caption": ["one two blue red three four", "blue it is red"]}]
    (tmp_path / "coco_karpathy_test.json").write_text(json.dumps(records))
    found, _ = evaluate(capsys, tmp_path)
    assert (found["format"], found["cases"], found["chance"]["acc"]) == ("order", 2, 0.25)
    kinds = found["groups"]["order of words"]
    assert list(kinds) == ["all words", "trigrams", "within trigrams"]
    assert kinds["within trigrams"]["metrics"]["acc"] == 0.0
    assert kinds["trigrams"]["metrics"]["acc"] == 1.0
    data = write_shard(tmp_path / "a.tar", [{"png": solid("red"), "txt": b"blue then red, and so on"}])
    assert evaluate(capsys, data, "--format", "order")[0]["cases"] == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "w.pt"
    torch.save(create_model("ViT-T-8-32").state_dict(), path)
    return ["--model", "ViT-T-8-32", "--pretrained", str(path)]


@pytest.mark.long
def test_the_command_on_scenes(model, tmp_path, capsys, monkeypatch):
    outputs = ["--json", tmp_path / "r.json", "--html", tmp_path / "p.html", "--plot", tmp_path / "p.png", "--table"]
    arguments = ["eval", "compositional", *model, "--data", "shapes:48@5", "--features", tmp_path / "f"]
    code, out, err = run_command(capsys, *arguments, *outputs)
    assert code == 0, err
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["format"], found["cases"], found["dataset"]) == ("shapes", 48, "shapes:48@5")
    assert {name: x["cases"] for name, x in found["groups"]["kind"].items()} == dict.fromkeys(
        ("colour", "shape", "binding", "relation", "count", "order"), 8
    )
    assert sum(x["cases"] for x in found["groups"]["relation"].values()) == 8
    assert "kind: binding" in out
    assert "chance" in out
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    check_page((tmp_path / "p.html").read_text(), found)
    # what is kept is all that is needed
    monkeypatch.setattr(Encoder, "images", None)
    monkeypatch.setattr("clipfast.evaluation.encoder.encode_texts", None)
    code, out, err = run_command(capsys, *arguments)
    assert code == 0, err
    assert json.loads(out) == found


def test_a_list_of_shards_may_be_longer_than_a_name_of_a_file():
    assert files_of("::".join(f"{number}.tar" for number in range(2000))) == []


def check_page(page, results):
    assert not re.search(r"<script|https?://|<link|<iframe", page)
    assert "default-src 'none'" in page
    sources = re.findall(r'<img src="(.*?)"', page)
    assert len(sources) == page.count("<figure") == 36
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (64, 64)
    for name, found in results["groups"]["kind"].items():
        assert f"<h2>kind: {name}</h2>" in page
        assert f"{found['metrics']['acc']:.1%} (" in page
    assert "could be chance" in page


def test_a_page_runs_nothing(seeing, tmp_path, capsys):
    text = json.dumps({"caption": f"{HOSTILE} red", "negative_caption": f"{HOSTILE} blue", "of": HOSTILE}).encode()
    data = write_shard(tmp_path / "a.tar", [{"png": solid("red"), "json": text}])
    evaluate(capsys, data, "--group-by", "of", "--html", tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;") >= 4


def texts_tar(folder, **fields):
    return write_shard(folder / "b.tar", [{"png": solid("red"), "json": json.dumps(fields).encode()}])


def with_file(name, content):
    return lambda folder: (folder / name).write_text(content) and folder / name


WRONG = {
    "no wrong captions": (lambda f: texts_tar(f, caption="red"), [], "has no wrong captions: none of negative_caption"),
    "no wrong caption in a pair": (
        lambda f: texts_tar(f, caption="red"), ["--format", "pairs"], "not one of the 1 images of the evaluation set",
    ),
    "no such set": (lambda f: f / "none.tar", [], "no such shard: "),
    "scenes": (lambda f: "shapes:many", [], "'shapes:many' is neither shapes:N nor shapes:N@SEED"),
    "no JSON": (with_file("a.json", "{"), [], "a.json cannot be read as JSON: "),
    "no records": (with_file("a.json", "[]"), [], "a.json holds no records"),
    "no objects": (with_file("a.json", "[3]"), [], "record 0 of {tmp}/a.json is no object but 3"),
    "unknown keys": (with_file("a.json", '[{"x": 1}]'), [], "a.json has the keys of no known format: winoground has "),
    "a key is missing": (
        with_file("a.json", '[{"filename": "x", "caption": "y", "negative_caption": "z"}, {"filename": "x"}]'), [],
        "record 1 of {tmp}/a.json has no 'caption', only 'filename'",
    ),
    "an empty caption": (
        with_file("a.json", '[{"filename": "x", "caption": "y", "negative_caption": " "}]'), [],
        "record 0 of {tmp}/a.json has no text as 'negative_caption' but ' '",
    ),
    "a box of words": (
        with_file("a.json", '[{"image_path": "x", "true_caption": "y", "false_caption": "z", "bbox_x": "1"}]'), [],
        "record 0 of {tmp}/a.json has no numbers in bbox_x, ",
    ),
    "no images folder": (
        with_file("a.json", '[{"filename": "x", "caption": "y", "negative_caption": "z"}]'),
        ["--images", "nowhere"], "--images nowhere: there is no such folder",
    ),
    "no image": (
        with_file("a.json", '[{"filename": "x.png", "caption": "y", "negative_caption": "z"}]'), [],
        "not one of the 1 images of the evaluation set can be used; first: x.png: ",
    ),
    "images of a tar": (lambda f: texts_tar(f, caption="a", negative_caption="b"), ["--images", "."], "--images is"),
    "format of a tar": (lambda f: texts_tar(f, caption="a"), ["--format", "aro"], "--format aro is for files of"),
    "no order": (lambda f: texts_tar(f, caption="red"), ["--format", "order"], "not one case can be made of"),
    "plot": (lambda f: "shapes:6", ["--plot", "nowhere/p.png"], "no folder nowhere to write p.png in"),
    "page": (lambda f: "shapes:6", ["--html", "nowhere/p.html"], "no folder nowhere to write p.html in"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name, seeing, tmp_path, capsys):
    make, arguments, message = WRONG[name]
    data = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run_command(capsys, "eval", "compositional", "--model", "seeing", "--data", data, *arguments)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("clipfast eval: error: ")
    assert message.format(tmp=tmp_path) in last
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_with_several_sets_is_refused(seeing, tmp_path, capsys):
    write_aro(tmp_path)
    write_sugar_crepe(tmp_path)
    code, _, err = run_command(capsys, "eval", "compositional", "--model", "seeing", "--data", tmp_path)
    assert code == 2
    assert "holds files of several formats: add_att.json (sugarcrepe)" in err


def test_a_box_that_cannot_be_cut_out_is_named(seeing, tmp_path, capsys):
    path = write_aro(tmp_path)
    records = json.loads(path.read_text())
    records[0]["bbox_w"], records[1]["bbox_h"] = 0, 1e9
    records += [records[2] | {"bbox_x": float(value)} for value in ("nan", "inf", "-1e300")]
    path.write_text(json.dumps(records))
    found, err = evaluate(capsys, path)
    assert (found["cases"], found["left_out_cases"], found["skipped_images"]) == (1, 5, 5)
    assert "left out 1.png: the box of 0x16 pixels at 0, 0 cannot be cut out" in err


def as_rank(rank, commands):
    """Run commands as one of the processes of torchrun, and return what each prints."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(dict(zip(names, map(str, (rank, rank, 3, 3)), strict=True)))
    found = []
    for arguments in commands:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(arguments)
        found.append((code, out.getvalue(), err.getvalue() if code else ""))
    return found


@pytest.mark.long
def test_three_ranks_give_what_one_gives(model, tmp_path, capsys):
    """With 8 images a batch the ranks have three, two and two blocks; SugarCrepe's images are one block of one rank."""
    write_sugar_crepe(tmp_path / "crepe")
    data = write_shard(tmp_path / "a.tar", pairs())
    commands = [
        ["eval", "compositional", *model, "--data", str(name), "--batch-size", "8", "--device", "cpu"]
        for name in ("shapes:50", tmp_path / "crepe", data)
    ]
    alone = []
    for arguments in commands:
        code, out, err = run_command(capsys, *arguments)
        assert code == 0, err
        alone.append((0, out, ""))
    assert run_ranks(as_rank, 3, commands, folder=tmp_path) == [alone, *[[(0, "", "")] * 3] * 2]
