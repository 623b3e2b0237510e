"""Heat maps in the app: the same as those of the library, texts as text, and messages about what cannot be used."""

import base64
import dataclasses
import html
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from clipfast.data.shapes import held_out_scene
from clipfast.search.app import MAP_SIDE, MAX_MAPS, MAX_RATIO, MAX_TEXT, Desk, answer
from clipfast.search.heatmap import heat_maps, overlay, to_tensor

EVIL = '<img src=x onerror=alert(1)> & "quoted"'


@pytest.fixture(scope="module")
def scene(folder):
    path = folder / "scene.png"
    held_out_scene(2).picture().save(path)
    return str(path)


def pictures(found):
    """The pictures in an answer, decoded."""
    addresses = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', found)
    return [Image.open(io.BytesIO(base64.b64decode(address))) for address in addresses]


def test_each_text_has_its_map(desk, encoder, scene):
    texts = ["a red circle", "a blue square"]
    picture = Image.open(scene).convert("RGB")
    maps = heat_maps(encoder.model, to_tensor(picture, 32), encoder.texts(texts))
    found = desk.heat_map(scene, f"{texts[0]}\n\n {texts[1]} \n{texts[0]}\n")
    captions = re.findall(r"<figcaption>(.*?)<span.*?>(.*?)</span>", found)
    assert captions == [(text, f"{heat.min():.4f} to {heat.max():.4f}") for text, heat in zip(texts, maps, strict=True)]
    large = ImageOps.contain(picture, (MAP_SIDE, MAP_SIDE))
    shown = [np.asarray(image, np.float32) for image in pictures(found)]
    drawn = [np.asarray(overlay(large, heat, (maps.min(), maps.max())), np.float32) for heat in maps]
    distances = np.array([[np.abs(one - other).mean() for other in drawn] for one in shown])
    assert distances.diagonal().max() < 2  # JPEG changes a little
    assert distances[0, 1] > 10  # another text's map is another picture
    assert distances[1, 0] > 10


def test_texts_are_shown_as_text(desk, scene):
    found = desk.heat_map(scene, EVIL)
    assert f"<figcaption>{html.escape(EVIL)}<" in found
    assert found.count("<img") == 1
    assert answer(desk.heat_map, scene, "\ud800").count("<figure>") == 1


@pytest.mark.parametrize("size", [(1, 1), (3000, 2000), (10 * MAX_RATIO, 10), (10, 10 * MAX_RATIO)])
def test_a_map_is_shown_in_one_size(size, desk, tmp_path):
    Image.new("RGB", size, "teal").save(tmp_path / "one.png")
    (shown,) = pictures(desk.heat_map(str(tmp_path / "one.png"), "teal"))
    assert max(shown.size) == MAP_SIDE
    assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.02)


@pytest.mark.parametrize(
    ("name", "texts", "expected"),
    [
        (None, "a", "drop a picture"),
        ("scene.png", None, "there are 0"),
        ("scene.png", " \n\t\n", "there are 0"),
        ("scene.png", "\n".join(map(str, range(MAX_MAPS + 1))), f"1 to {MAX_MAPS} texts"),
        ("scene.png", "x" * (MAX_TEXT + 1), "at most"),
        ("broken.png", "a", "not an image"),
        ("bomb.png", "a", "size"),
        ("gone.png", "a", "gone.png"),
        ("long.png", "a", f"at most {MAX_RATIO} times the other one, got 51 x 10"),
    ],
)
def test_an_error_is_a_message(name, texts, expected, desk, folder, scene, caplog):
    Image.new("RGB", (10 * MAX_RATIO + 1, 10)).save(folder / "long.png")
    found = answer(desk.heat_map, name and str(folder / name), texts)
    assert 'role="alert"' in found
    assert expected in found
    assert not caplog.records  # nothing that nobody foresaw


def test_another_packages_model_is_refused(desk, embeddings, encoder, scene, caplog):
    other = Desk(embeddings, encoder, desk.pictures)
    other.encoder = dataclasses.replace(encoder, model=torch.nn.Linear(1, 1))
    assert "need a model of clipfast.create_model" in answer(other.heat_map, scene, "a")
    assert not caplog.records
