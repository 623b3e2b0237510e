"""The classes that a shifted set shares with its base: labels are matched, and both are judged on equal classes."""

import json

import pytest
import torch
from PIL import Image

from clipfast.evaluate.class_subsets import ClassSubset, match_classes, read_class_map
from clipfast.evaluate.features import LabelledFeatures
from clipfast.evaluate.labelled import LabelledSet
from clipfast.evaluate.shifted_sets import shifted_set

BASE = [f"n{number:08}" for number in range(1000)]
NUMBERS = [str(number) for number in range(1000)]


def images_of(labels, features):
    """Return features with labels, to be judged over a subset of the classes."""
    return LabelledFeatures(features, list(labels), [(label,) for label in labels], [""] * len(labels))


@pytest.mark.parametrize("base", [BASE, NUMBERS], ids=["wnids", "numbers"])
def test_the_numbers_of_all_classes_mean_them_in_order_and_those_of_another_list_are_refused(base):
    """CLIP_benchmark numbers the 200 classes of ImageNet-A from 0. They must not be taken for ImageNet's numbers."""
    found = match_classes(base, sorted(NUMBERS), None, "v2")  # sorted as texts, the class "10" comes before "2"
    assert found == {number: (int(number),) for number in NUMBERS}
    for first in (0, 1):
        labels = [str(first + number) for number in range(200)]
        with pytest.raises(ValueError, match=f"a has classes {first} to {first + 199}, .* --class-map a=FILE"):
            match_classes(base, labels, None, "a")
    assert match_classes(base, labels, {label: [3] for label in labels}, "a")[labels[0]] == (3,)


def test_labels_that_the_base_lacks_are_named():
    with pytest.raises(ValueError, match=r"r has 2 labels that the base lacks, such as 'cow': say by --class-map r="):
        match_classes(["cat", "dog"], ["cat", "cow", "eel"], None, "r")
    assert match_classes(NUMBERS, ["70", "6"], None, "a") == {"6": (6,), "70": (70,)}
    given = {"cow": [], "pet": ["dog", 0]}
    assert match_classes(["cat", "dog"], ["cat", "cow", "pet"], given, "r") == {"cat": (0,), "cow": (), "pet": (0, 1)}
    for wrong in ("cow", 2, -1):
        with pytest.raises(ValueError, match=f"class map of r: 'pet' is {wrong!r}, which is no class of the base"):
            match_classes(["cat", "dog"], ["pet"], {"pet": [wrong]}, "r")


def test_labels_that_share_a_class_of_the_base_are_one_class():
    base = ["cat", "dog", "eel", "fox", "gnu"]
    found = ClassSubset.of(base, {"x": (3, 4), "y": (2,), "z": (0, 1), "w": (1, 3), "v": ()}, "r")
    assert found.names == ("x", "eel")
    assert found.members == ((0, 1, 3, 4), (2,))
    assert found.of_label == {"x": 0, "y": 1, "z": 0, "w": 0}
    assert found.of_base == {"cat": 0, "dog": 0, "eel": 1, "fox": 0, "gnu": 0}
    with pytest.raises(ValueError, match="r has no class of the base, whose first one is 'cat'"):
        ClassSubset.of(["cat"], {"x": ()}, "r")


def test_both_sets_are_judged_over_the_shared_classes_only():
    """The model takes images for an "eel", which only the base has, so the best class of both sets decides."""
    base = ["cat", "dog", "cow", "eel"]
    subset = ClassSubset.of(base, {"one": (0,), "two": (1, 2), "other": ()}, "r")
    cat, dog, cow = torch.tensor([[0.5, 0.2, 0.1, 0.9], [0.1, 0.5, 0.2, 0.9], [0.1, 0.2, 0.5, 0.9]])
    shifted = images_of(["one", "two", "two", "two", "other"], torch.stack([cat, cat, dog, cow, cat]))
    found = subset.classify(shifted, subset.of_label, torch.eye(4))
    assert (found.classnames, found.right.tolist()) == (("cat", "two"), [True, False, True, True])
    own = images_of(["cat", "dog", "cow", "cow", "eel"], torch.stack([dog, cow, cat, dog, cat]))
    assert subset.classify(own, subset.of_base, torch.eye(4)).right.tolist() == [False, True, False, True]


CLASS_MAPS = {
    "[1]": "must hold an object of labels, not list",
    '{"a": {"b": 1}}': "'a' must be a label of the base, the number of a class, or a list",
    '{"a": [true]}': "'a' must be a label of the base",
    '{"a": ': "is no JSON",
}


def test_class_maps(tmp_path):
    path = tmp_path / "m.json"
    with pytest.raises(ValueError, match="there is no file"):
        read_class_map(path)
    for content, message in CLASS_MAPS.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_class_map(path)
    path.write_text('{"a": "b", "c": 3, "d": ["e", 1], "f": []}')
    assert read_class_map(path) == {"a": ["b"], "c": [3], "d": ["e", 1], "f": []}


def picture_in(folder, size=(6, 5)):
    """Write a picture of a shifted set into a folder."""
    folder.mkdir(parents=True)
    Image.new("RGB", size, "red").save(folder / "x.png")


def objectnet(folder):
    """Write three classes in ObjectNet's layout: the first is one class of ImageNet, the second two, the third none."""
    for name in ("alarm_clock", "bench", "air_freshener"):
        picture_in(folder / "images" / name)
    (folder / "images" / "broken").mkdir()  # ImageNet has no class "broken", so this folder must not be read
    mappings = folder / "mappings"
    mappings.mkdir()
    labels = {"alarm_clock": "Alarm clock", "bench": "Bench", "air_freshener": "Air freshener"}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    overlap = {"Alarm clock": "analog clock, a", "Bench": "park bench; seat, bench"}
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(overlap))
    (mappings / "imagenet_to_label_2012_v2").write_text("seat, bench\nanalog clock, a\npark bench\n")
    (mappings / "pytorch_to_imagenet_2012_id.json").write_text('{"0": 2, "1": 0, "2": 1}')
    return folder


@pytest.mark.parametrize("source", ["objectnet-1.0", ""])
def test_objectnet_is_read_as_its_archive_has_it(tmp_path, source):
    objectnet(tmp_path / "objectnet-1.0")
    found = shifted_set("objectnet", str(tmp_path / source), LabelledSet, None)
    assert found.class_map == {"alarm_clock": [2], "bench": [0, 1], "air_freshener": []}
    assert [image.label for image in found.images] == ["alarm_clock", "bench"]
    assert len(found.images.places()) == 2
    # ObjectNet's red border is cut off, but not from an image that is too small for one
    assert found.change(next(iter(found.images)).image).size == (4, 3)
    assert found.change(Image.new("RGB", (2, 9))).size == (2, 9)
    assert found.images.stamp() != LabelledSet(found.images.data, classes=frozenset({"bench"})).stamp()


LACKING = {
    "": (None, "there is no folder .*mappings: --shift objectnet="),
    "imagenet_to_label_2012_v2": ("x", "'Alarm clock' means 'analog"),
    "objectnet_to_imagenet_1k.json": (None, "there is no file .*_1k.json"),
    "pytorch_to_imagenet_2012_id.json": ("[]", "an object, not list"),
}


@pytest.mark.parametrize("name", LACKING)
def test_objectnet_that_lacks_something(tmp_path, name):
    content, message = LACKING[name]
    path = objectnet(tmp_path / "o") / "mappings" / name
    path.write_text(content) if content else path.rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=message):
        shifted_set("objectnet", str(tmp_path / "o"), LabelledSet, None)


FOLDERS = {
    "imagenet-v2": "imagenetv2-matched-frequency-format-val", "imagenet-r": "imagenet-r", "imagenet-sketch": "sketch",
    "imagenet-a": "", "other": "",
}  # fmt: skip


def test_names_find_the_folder_in_that_of_their_archive(tmp_path):
    for name, folder in FOLDERS.items():
        picture_in(tmp_path / name / folder / "n01443537")
        found = shifted_set(name, str(tmp_path / name), LabelledSet, None)
        assert [image.label for image in found.images] == ["n01443537"]
        assert found.change is None
