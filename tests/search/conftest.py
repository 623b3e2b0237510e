"""A small set of embedded pictures for the tests of the search commands, and another for those of the search app."""

import re
import struct
import zlib

import pytest
import torch
from PIL import Image

from clipfast import Embeddings, create_model
from clipfast.checkpoints.open_clip_folder import export_open_clip
from clipfast.cli.main import main
from clipfast.evaluate.encoder import Encoder
from clipfast.search.app import Desk, Pictures

from ..small_runs import picture, sample, write_shard
from ..train.faults import faulty_samples
from .embedding import TINY, options

EVIL = "<img onerror=alert(1)>.png"
CAPTION = "<b>bold</b> & 'single' \"double\""
FOLDER = 'it\'s "quoted" <i>'
COLOURS = ("red", "green", "blue", "white", "black", "yellow")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Make two models, 24 pairs and their embeddings in a folder; pairs 20 and 21 have pair 3's picture, 21 larger."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("tqdm")
    folder = tmp_path_factory.mktemp("commands")
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        export_open_clip(create_model(TINY), folder / name)
    changes = {20: {"png": picture(3)}, 21: {"png": picture(3, size=48)}}
    write_shard(folder / "data.tar", [sample(index, **changes.get(index, {})) for index in range(24)])
    arguments = ["--model", f"local-dir:{folder}/model", "--data", str(folder / "data.tar"), "--device", "cpu"]
    assert main(["embed", *arguments, "--output", str(folder / "embedded")]) == 0
    both = Embeddings.open(folder / "embedded")
    Embeddings(both.features, both.metadata, about=both.about).save(folder / "pictures")
    (folder / "one.png").write_bytes(picture(3))
    (folder / "two.png").write_bytes(picture(7))
    return folder


@pytest.fixture(scope="session")
def faulty(tmp_path_factory):
    """Make a folder with a model and two shards of pairs to embed, some of which are unusable."""
    folder = tmp_path_factory.mktemp("faulty")
    torch.manual_seed(0)
    export_open_clip(create_model(TINY), folder / "model")
    write_shard(folder / "a.tar", [*faulty_samples(), *(sample(index) for index in range(20))])
    write_shard(folder / "b.tar", [sample(index, png=picture(100 + index)) for index in range(17)])
    return folder


@pytest.fixture(scope="session")
def whole(faulty, tmp_path_factory):
    """Embed the pairs of ``faulty`` in one uninterrupted process, and return the folder of the embeddings."""
    output = tmp_path_factory.mktemp("whole") / "e"
    assert main(options(faulty, output)) == 0
    return output


def png_of_size(width, height):
    """Return a PNG picture to embed whose header states a false size."""

    def chunk(kind, content):
        """Return a chunk of a PNG picture to embed: length, kind, content and checksum."""
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 1000)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Make a model and a folder of pictures for the search app, which has a link to a picture outside the folder."""
    folder = tmp_path_factory.mktemp("app")
    torch.manual_seed(0)
    export_open_clip(create_model(TINY), folder / "model")
    (folder / FOLDER).mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (40, 30 + number), colour).save(folder / FOLDER / (EVIL if number == 0 else f"{number}.png"))
    Image.new("RGB", (50, 50), "pink").save(folder / "outside.png")
    (folder / FOLDER / "link.png").symlink_to(folder / "outside.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "bomb.png").write_bytes(png_of_size(60_000, 60_000))
    return folder


@pytest.fixture(scope="session")
def encoder(folder):
    """Return the model with which the pictures of the embedded folder were encoded."""
    return Encoder.load(f"local-dir:{folder / 'model'}", device="cpu")


@pytest.fixture(scope="session")
def embeddings(folder, encoder):
    """Return embeddings of six pictures, and three rows whose paths (absolute, link, "..") lead out of the folder."""
    names = [EVIL, *(f"{number}.png" for number in range(1, len(COLOURS)))]
    pixels = [encoder.transform(Image.open(folder / FOLDER / name)) for name in names]
    features = encoder.images(torch.stack([*pixels, *pixels[:3]]))
    outside = [str(folder / "outside.png"), str(folder / FOLDER / "link.png"), "../outside.png"]
    metadata = {
        "image_path": [str(folder / FOLDER / name) for name in names] + outside,
        "caption": [CAPTION, *COLOURS[1:], "outside", "outside", "outside"],
        "height": [30 + number for number in range(6)] + [50] * 3,
    }
    about = {**encoder.about(), "data": str(folder / FOLDER)}
    found = Embeddings(features, metadata, about=about)
    found.save(folder / "embedded")
    return found


@pytest.fixture(scope="session")
def desk(folder, encoder, embeddings):
    """Return the Desk, which answers the requests of the search app, for the embedded folder."""
    return Desk(embeddings, encoder, Pictures([folder / FOLDER]))


def rows(found):
    """Return the rows (numbers of the embedded items) that a page of the search app shows."""
    return [int(row) for row in re.findall(r'data-row="(\d+)"', found)]
