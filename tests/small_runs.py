"""Small image-text shards, short training runs on them, and fixtures and helpers for tests of commands and runs."""

import functools
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from clipfast.checkpoints.of_run import Checkpoints
from clipfast.cli.main import main
from clipfast.runs.folder import RunFolder
from clipfast.train import loop, trainer
from clipfast.train.loop import train
from clipfast.train.optim import parse_arguments

# Configurations of models whose checkpoints are written in no time; TINY is a vision transformer.
TINY, RESNET, NAFLEX, SIGLIP = (
    str(Path(__file__).with_name(f"{name}.json")) for name in ("tiny", "resnet", "naflex", "siglip")
)
draw_pictures = loop._pictures  # the original function, since tests of the trainer replace it in the module ``loop``
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "purple", "orange")


def write_shard(path: Path, samples: list[dict[str, bytes]] | int) -> Path:
    """Write a shard for small runs, with ``samples`` or with that many good samples; their keys are 000, 001, ..."""
    samples = [sample(index) for index in range(samples)] if isinstance(samples, int) else samples
    mode = "w:gz" if path.suffix == ".gz" else "w"
    with tarfile.open(path, mode) as tar:
        for index, members in enumerate(samples):
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{index:03d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def picture(seed: int, size: int = 24, width: int | None = None) -> bytes:
    """Draw the picture of a sample of the small runs as a PNG file."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, 3)
    pixels = np.clip(base + rng.integers(-20, 20, (size, width or size, 3)), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def sample(index: int, **changes: bytes) -> dict[str, bytes]:
    """Return a good sample for small runs, with ``changes`` to its files."""
    colour = COLOURS[index % len(COLOURS)]
    meta = {"label": f"thing {index}", "keywords": [colour, "noise"], "category": "even" if index % 2 == 0 else "odd"}
    return {
        "png": picture(index),
        "txt": f"a {colour} thing {index}".encode(),
        "json": json.dumps(meta).encode(),
    } | changes


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a ``clipfast`` command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        code = exit_.code
    return code, *capsys.readouterr()


def output_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """Return stdout and stderr of a ``clipfast`` command that succeeds."""
    code, out, err = run_command(capsys, *arguments)
    assert code == 0, err
    return out, err


def refusal_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return stderr of a ``clipfast`` command that is refused."""
    code, _, err = run_command(capsys, *arguments)
    assert code == 2, err
    return err


def cases(text: str) -> pytest.MarkDecorator:
    """Parametrise over lines such as ``lr=-1.0 opt=sgd: --lr must be``: options, and a pattern for the error."""
    lines = [line.split(": ", 1) for line in text.strip().splitlines()]
    return pytest.mark.parametrize(
        ("options", "said"), [(parse_arguments(words.split()), said) for words, said in lines]
    )


def commands(text: str) -> pytest.MarkDecorator:
    """Parametrise over lines such as ``train --lr 0 => --lr must be``: a command's words, and a part of its error."""
    lines = [line.split(" => ") for line in text.strip().splitlines()]
    return pytest.mark.parametrize(("words", "said"), [(words.split(), said) for words, said in lines])


class BuildsModelError(Exception):
    """The error that a test's run raises where its model would be built, so it was not refused before."""


def everything(folder: Path) -> dict[Path, bytes | None]:
    """Return all files and folders in a folder of small runs with their content."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def open_files(folder: Path) -> list[str]:
    """Return the files of a folder that this process has open; earlier tests may have left files elsewhere open."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    files = [os.readlink(link) for link in links if os.path.lexists(link)]
    return [file for file in files if file.startswith(str(folder))]


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """A function that starts a run, and returns the line that refuses it, or "" if its model would be built."""

    def build_model(*_):
        """Stop a run that was not refused before its model is built."""
        raise BuildsModelError

    monkeypatch.setattr(trainer, "build_model", build_model)

    def start(*flags: str, **options: object) -> str:
        """Start a run with these options, and return the line that refuses it."""
        values = {"train_data": tmp_path / "x.tar", "model": TINY, "batch_size": 8, "logs": tmp_path / "logs"} | options
        before = everything(tmp_path)
        arguments = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]
        try:
            code, out, error = run_command(capsys, "train", *arguments, *flags)
        except BuildsModelError:
            return ""
        assert (code, out) == (2, "")
        assert everything(tmp_path) == before, "something was written"
        (line,) = error.splitlines()
        assert line.startswith("clipfast train: error: ")
        return line

    return start


@pytest.fixture
def small(shards, tmp_path):
    """A function that returns the options of a training run of eight steps on the small shards, with some changed."""
    from .train.test_training import config

    return functools.partial(config, shards, tmp_path)


@pytest.fixture
def run_small(small):
    """A function that trains for eight steps on the small shards, or resumes a run; it returns the run's folder."""
    return lambda resume=None, name="run", **options: train(replace(small(**options), name=name), resume)[0]


@pytest.fixture(scope="session")
def finished(shards, tmp_path_factory):
    """The folder of a finished run of eight steps with two evaluations. Tests read it and change nothing."""
    from .train.test_training import config

    validation = {"val_data": shards, "val_group_by": "category", "val_leave_out": ("odd",)}
    options = config(shards, tmp_path_factory.mktemp("finished"), save_every=3, save_frequency=1, **validation)
    with mock.patch.object(loop, "_pictures", draw_pictures):
        return train(options)[0]


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, for tests that change it."""
    shutil.copytree(finished.path, tmp_path / "run")
    store = Checkpoints(tmp_path / "run/checkpoints")
    store.latest.unlink()
    store.begin(store.step_path(8))  # in the copy, ``latest`` was a file of its own instead of a link to this one
    return RunFolder(tmp_path / "run")


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    """The checkpoints of the run in the folder "run"."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    return Checkpoints(tmp_path / "run/checkpoints")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards of 24 samples with the same labels, the second one gzipped."""
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "a.tar", [sample(index) for index in range(24)])
    write_shard(folder / "b.tar.gz", [sample(index, png=picture(100 + index)) for index in range(24)])
    return f"{folder}/a.tar::{folder}/b.tar.gz"


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A web server for shards that also serves ranges of bytes, and records which bytes are requested."""

    def refused(self, path):
        """Send an error for a shard that is not there or must fail some more times, and return whether one was sent."""
        self.server.asked += 1
        self.server.is_answering.wait(20)
        left = self.server.failing.get(path.name, 0)
        self.server.failing[path.name] = max(left - 1, 0)
        if left or not path.is_file():
            self.send_error(503 if left else 404)
        return left or not path.is_file()

    def do_GET(self):
        """Answer a request for a range of bytes of a remote shard."""
        path = Path(self.translate_path(self.path))
        if self.refused(path):
            return
        data, asked = path.read_bytes(), self.headers.get("Range") if self.server.sends_parts else None
        first, last = 0, len(data) - 1
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(data)), len(data) - 1)
        self.server.served.append((path.name, last + 1 - first))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if self.server.changes:
            self.server.changes.pop()()
        self.wfile.write(data[first : last + 1])

    def send_head(self):
        """Answer HEAD for a remote shard."""
        path = Path(self.translate_path(self.path))
        if self.refused(path):
            return
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        if self.server.sends_parts:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", str(path.stat().st_mtime_ns))
        self.end_headers()

    def log_message(self, *args):
        """Print nothing about the requests for remote shards."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An HTTP server of the shards in the folder "web".

    ``served`` lists the name and the number of bytes of each answer, and ``failing`` says by name how many requests
    for a shard will fail. Each answer takes a function from ``changes`` and calls it before the bytes are sent. The
    server answers while ``is_answering`` is set.
    """
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("clipfast.data.remote.FIRST_WAIT", 0.01)
    (tmp_path / "web").mkdir()

    def handler(*args):
        """Answer a request for a shard in the folder "web"."""
        return Ranges(*args, directory=str(tmp_path / "web"))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.served, running.failing, running.url = [], {}, f"http://127.0.0.1:{running.server_port}"
        running.asked, running.sends_parts, running.changes, running.is_answering = 0, True, [], threading.Event()
        running.is_answering.set()
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.is_answering.set()
        running.shutdown()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A function that returns the options of a training run for a case of train/distributed.py, with changes.

    Test files with other cases replace this fixture by their own.
    """
    from .train.distributed import options_in

    return options_in(tmp_path_factory.mktemp("made"))


@pytest.fixture
def together(tmp_path):
    """The function ``run_together(size, *jobs)``, which runs training jobs one after the other on ``size`` ranks."""
    from .train.distributed import run_together

    return functools.partial(run_together, tmp_path)


def assert_initialised_alike(model, reference):
    """Check that a new model's constants equal a reference's, and random parameters have its standard deviations."""
    expected = dict(reference.named_parameters())
    for name, own in model.named_parameters():
        other = expected[name]
        if other.numel() == 1 or not other.std() > 0:
            torch.testing.assert_close(own, other, msg=name)
            continue
        tolerance = 0.15 if other.numel() > 1000 else 0.5
        assert own.std().item() == pytest.approx(other.std().item(), rel=tolerance), name
