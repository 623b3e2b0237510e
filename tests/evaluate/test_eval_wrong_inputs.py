"""Wrong inputs of all tasks of ``clipfast eval``: one line that names what is wrong, exit code 2, and nothing written.

Wrong inputs that only one task takes are tested in that task's file; weights and data that cannot be read are tested in
tests/checkpoints and tests/data.
"""

import pytest
import torch

from clipfast import create_model

from ..small_runs import picture, run_command, write_shard
from .benchmark_sets import coded, write_set


class Harmful:
    """A pickle that would run code if it were loaded."""

    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write good data and models for ``clipfast eval``, and broken, harmful and missing ones of many kinds."""
    folder = tmp_path_factory.mktemp("wrong")
    torch.manual_seed(0)
    weights = create_model("ViT-T-8-32").state_dict()
    torch.save(weights, folder / "good.pt")
    torch.save({name: value * float("nan") for name, value in weights.items()}, folder / "nan.pt")
    torch.save({"state_dict": weights, "hook": Harmful()}, folder / "harmful.pt")
    fields = [b'{"a": "%d", "negative_caption": "c"}' % (index % 2) for index in range(4)]
    pairs = [{"png": picture(index), "txt": b"ab"[index % 2 :][:1], "json": fields[index]} for index in range(4)]
    write_shard(folder / "good.tar", pairs)
    write_shard(folder / "other.tar", pairs)
    write_shard(folder / "broken.tar", [{"png": b"broken", "txt": b"a"}, {"png": b"", "txt": b"b"}])
    (folder / "empty").mkdir()
    for name in ("some", "none"):
        (folder / "classes" / name).mkdir(parents=True)
    (folder / "classes" / "some" / "x.png").write_bytes(picture(0))
    (folder / "names.txt").write_text("one\ntwo\nthree\n")
    (folder / "bare.txt").write_text("a photo\n")
    (folder / "turned.txt").write_text("b\nA\n", "utf-8-sig")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    write_set(folder / "root" / "wds_mnist", images=4, draw=coded)
    return folder


GOOD = {
    "--model": "ViT-T-8-32", "--pretrained": "{at}/good.pt", "--data": "{at}/good.tar",
    "--train-data": "{at}/other.tar", "--shift": "other={at}/other.tar", "--group-by": "a", "--min-count": "1",
    "--root": "{at}/root", "--output": "{at}/out",
}  # fmt: skip
FLAGS = {
    task: ("--model", "--pretrained", *more)
    for task, more in {
        "zeroshot": ("--data",), "retrieval": ("--data",), "probe": ("--data", "--train-data"),
        "robustness": ("--data", "--shift"), "overlap": ("--data", "--train-data"),
        "bias": ("--data", "--group-by", "--min-count"), "compositional": ("--data",), "suite": ("--root", "--output"),
    }.items()
}  # fmt: skip
EVERY = tuple(FLAGS)
MODELS = ("retrieval", "robustness", "suite")  # tasks of one model, of several models, and of several by their weights
SETS = ("zeroshot", "overlap", "compositional")  # tasks that read one set, two sets, pairs with wrong captions
PROMPTS = ("zeroshot", "probe", "robustness", "overlap", "bias")

# Each case has the tasks, the wrong value of an argument (None leaves the argument out), and the message.
WRONG = {
    "no such device": (EVERY, {"--device": "tpu"}, "tpu"),
    "features are a file": (EVERY, {"--features": "{at}/good.tar"}, "--features: {at}/good.tar is a file, not a"),
    "json nowhere": (EVERY, {"--json": "nowhere/r.json"}, "no folder nowhere to write r.json in"),
    "plot nowhere": (EVERY, {"--plot": "nowhere/p.png"}, "no folder nowhere to write p.png in"),
    "a flag that is almost right": (MODELS, {"--tabel": "x"}, "did you mean --table?"),
    "no such model": (MODELS, {"--model": "ViT-Q-9"}, "ViT-Q-9"),
    "no weights": (MODELS, {"--pretrained": None}, "has no weights"),
    "weights that would run code": (MODELS, {"--pretrained": "{at}/harmful.pt"}, "could run code"),
    "no numbers": (EVERY[:-1], {"--pretrained": "{at}/nan.pt"}, "contain NaN or infinity"),
    "no finished run": (MODELS, {"--model": "local-dir:{at}/empty", "--pretrained": None}, "{at}/empty"),
    "no data": (EVERY[:-1], {"--data": None}, "the following arguments are required: --data"),
    "data that are not there": (SETS, {"--data": "nowhere.tar"}, "no such shard: nowhere.tar"),
    "a folder without classes": (SETS[:2], {"--data": "{at}/empty"}, "{at}/empty has no sub-folders"),
    "a class without images": (SETS[:2], {"--data": "{at}/classes"}, "{at}/classes/none has no images"),
    "broken images": (SETS[:2], {"--data": "{at}/broken.tar"}, "not one of the 2 images of the evaluation set"),
    "labels that do not exist": (SETS, {"--label-by": "breed"}, "sample has no 'breed' in its json; it has a"),
    "groups that do not exist": (SETS, {"--group-by": "style"}, "sample has no 'style' in its json; it has a"),
    "names of more classes": (PROMPTS[2:], {"--classnames": "{at}/names.txt"}, "3 class names for 2 classes"),
    "names of more folders, before a model is loaded": (
        PROMPTS[2:], {"--classnames": "{at}/names.txt", "--data": "{at}/classes", "--model": "ViT-Q-9"},
        "3 class names for 2 classes: give one for each, in this order: none, some",
    ),
    "no file of names": (PROMPTS, {"--classnames": "nowhere"}, "--classnames must be 'imagenet' or a file"),
    "the labels in another order": (
        SETS[:2], {"--classnames": "{at}/turned.txt"}, "in another order: 'b' would name the class 'a'; sort them",
    ),
    "names in another encoding": (PROMPTS[:2], {"--classnames": "{at}/latin.txt"}, "{at}/latin.txt is not UTF-8: "),
    "a template without a place": (PROMPTS, {"--templates": "{at}/bare.txt"}, "has no {{}} for the class"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_input_has_its_message(name, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    tasks, changes, message = WRONG[name]
    before = sorted(folder.rglob("*"))
    for task in tasks:
        given = {flag: GOOD[flag] for flag in FLAGS[task]} | changes
        words = [word for flag, value in given.items() if value is not None for word in (flag, value)]
        code, out, err = run_command(capsys, "eval", task, *(word.format(at=folder) for word in words))
        assert (code, out) == (2, ""), (task, err)
        assert message.format(at=folder) in err.splitlines()[-1], (task, err)
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith(
            ("clipfast eval: error: ", "clipfast: error: ", f"clipfast eval {task}: error: ")
        )
        assert sorted(folder.rglob("*")) == before, task
