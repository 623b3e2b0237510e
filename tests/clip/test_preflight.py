"""What is refused before a run is built: by one line, with nothing written; and what is not."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast.data import index, spread
from clipfast.evaluation import labelled
from clipfast.host import Memory
from clipfast.training import lock, loop, trainer
from clipfast.training import preflight as module
from clipfast.training.loop import train
from clipfast.training.preflight import preflight
from clipfast.training.run import RunFolder
from clipfast.training.world import World

from .conftest import TINY, run_command, sample, write_shard
from .siglip import CONFIGS, save_tokenizer
from .test_training import config

PAIRS = [sample(number) for number in range(8)]


class BuildsModelError(Exception):
    """Raised in place of a model being built: nothing refuses the run before that."""


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """A function that starts a run, and returns the line that refuses it, or "" if its model would be built."""

    def build_model(*_):
        raise BuildsModelError

    monkeypatch.setattr(trainer, "build_model", build_model)

    def start(*flags: str, **options: object) -> str:
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


def changed(**changes: bytes) -> list[dict[str, bytes]]:
    return [sample(number, **changes) for number in range(8)]


def without(*keys: str) -> list[dict[str, bytes]]:
    return [{key: value for key, value in pair.items() if key not in keys} for pair in PAIRS]


@pytest.mark.parametrize(
    ("pairs", "parts"),
    [
        (without("png"), ("(4 x no image); first: x.tar/000: sample has no image", "only json with ", "--image-key")),
        (
            [{"picture": pair["png"], "txt": pair["txt"]} for pair in PAIRS],
            ("(4 x no image); first: x.tar/000: sample has no image (jpg, ", "only picture, txt", "--image-key"),
        ),
        (without("txt", "json"), ("(4 x no caption); first: x.tar/000: sample has no caption (txt", "7.jpg, 7.txt")),
        (without("txt"), ("sample has no caption (txt", "--text-key")),
        (changed(txt=b" "), ("(4 x no caption); first: x.tar/000: caption is empty",)),
        (
            changed(png=b"GIF89"),
            ("(4 x not an image); first: x.tar/000: ", "; convert such images, or leave"),
        ),
        (changed(png=PAIRS[0]["png"][:60]), ("(4 x broken image); first: x.tar/000: image cannot be decoded",)),
        (PAIRS[:7], ("hold 7 pairs, less than one batch of 8: lower --batch-size, or name more shards",)),
        ([], ("the shards hold no samples: ",)),
    ],
    ids=["no image", "wrong key", "no caption", "json alone", "empty", "not an image", "broken", "too few", "none"],
)
def test_pairs_that_cannot_be_used(pairs, parts, tmp_path, refusal):
    write_shard(tmp_path / "x.tar", pairs)
    line = refusal()
    assert [part for part in parts if part not in line] == []
    write_shard(tmp_path / "x.tar", PAIRS)
    assert refusal() == ""


def test_a_shard_that_is_not_there(tmp_path, refusal):
    pattern = f"{tmp_path}/{{a,b}}.tar"
    write_shard(tmp_path / "a.tar", PAIRS)
    assert f"no such shard: {tmp_path}/b.tar (1 of 2 are missing)" in refusal(train_data=pattern)
    (tmp_path / "b.tar").symlink_to(tmp_path / "c.tar")  # which is not there either
    assert f"no such shard: {tmp_path}/b.tar (1 of 2 are missing)" in refusal(train_data=pattern)
    write_shard(tmp_path / "c.tar", PAIRS)
    assert refusal(train_data=pattern) == ""


def test_a_shard_without_permission(tmp_path, refusal, monkeypatch):
    """Tests may run as root, whom the system refuses nothing: its answers are replaced."""
    shard = write_shard(tmp_path / "x.tar", PAIRS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != shard)
        assert f"no permission to read {shard} (1 of 1 shards): chmod a+r, or leave it out" in refusal()
    original = os.open

    def refusing(path, *arguments, **options):
        if path == str(shard):
            raise PermissionError(13, "Permission denied", path)
        return original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        assert f"shard {shard} cannot be opened: Permission denied; make it anew, or leave it out" in refusal()
    assert refusal() == ""


@pytest.mark.parametrize("content", [b"a photo", b"", b"\x1f\x8b not gzip", b"x" * 5000])
def test_a_file_that_is_no_shard(content, tmp_path, refusal):
    (tmp_path / "x.tar").write_bytes(content)
    line = refusal()
    assert f"shard {tmp_path}/x.tar cannot be read: " in line
    assert line.endswith("; make it anew, or leave it out")
    write_shard(tmp_path / "x.tar", PAIRS)
    assert refusal() == ""


def test_a_folder_that_is_named_like_a_shard(tmp_path, refusal):
    (tmp_path / "x.tar").mkdir()
    assert f"{tmp_path}/x.tar" in refusal()


def test_a_key_that_no_pair_has(tmp_path, refusal):
    write_shard(tmp_path / "x.tar", PAIRS)
    line = refusal(unique_by="breed")
    assert "(4 x no such field); first: x.tar/000: sample has no 'breed' in its json; it has category, keywords" in line
    assert line.endswith("; name a key that the pairs have")
    assert refusal(unique_by="label") == ""


def test_one_part_of_a_mix_cannot_be_used(tmp_path, refusal):
    write_shard(tmp_path / "x.tar", PAIRS)
    write_shard(tmp_path / "y.tar", without("png"))
    both = {"train_data": f"{tmp_path}/x.tar::{tmp_path}/y.tar"}
    assert refusal(**both) == ""  # half of the pairs can
    factors = [*["--train-data-upsampling-factors", "1", "3"]]
    assert "(4 x no image); first: y.tar/000" in refusal(*factors, **both)


def test_a_tokenizer_that_does_not_fit(tmp_path, refusal):
    write_shard(tmp_path / "x.tar", PAIRS)
    raw = json.loads(Path(TINY).read_text())
    raw["text_cfg"]["vocab_size"] = 1000
    (tmp_path / "narrow.json").write_text(json.dumps(raw))
    line = refusal(model=tmp_path / "narrow.json")
    assert "CLIP's tokenizer has 49408 tokens, and " in line
    assert "knows only 1000: set vocab_size of its text_cfg to 49408" in line
    siglip = {"model": tmp_path / "small.json"}
    siglip["model"].write_text(json.dumps(CONFIGS["exact"].to_dict()))  # 300 tokens
    assert "needs the file tokenizer.json of its tokenizer, which clipfast does not ship" in refusal(**siglip)
    assert f"there is no tokenizer at {tmp_path}/none" in refusal(**siglip, tokenizer=tmp_path / "none")
    save_tokenizer(tmp_path / "wide", "gemma", vocab_size=400)
    (tmp_path / "wide/tokenizer.json").write_text(widened((tmp_path / "wide/tokenizer.json").read_text()))
    assert "has 301 tokens, and " in refusal(**siglip, tokenizer=tmp_path / "wide")
    save_tokenizer(tmp_path / "fitting")
    assert refusal(**siglip, tokenizer=tmp_path / "fitting") == ""


def widened(text: str) -> str:
    """A tokenizer of 301 tokens."""
    raw = json.loads(text)
    vocabulary = raw["model"]["vocab"]
    raw["model"] |= {"vocab": vocabulary | {f"token {n}": n for n in range(len(vocabulary), 301)}}
    return json.dumps(raw)


def test_the_model_and_its_loss(tmp_path, refusal):
    write_shard(tmp_path / "x.tar", PAIRS)
    assert "unknown model 'ViT-Z'; known: RN50" in refusal(model="ViT-Z")
    assert "no checkpoint at none.pt: there is no such file" in refusal(model="ViT-T-8-32", pretrained="none.pt")
    assert "is a CLIP model, which has no logit_bias: take a model with SigLIP in its name" in refusal("--siglip")
    assert refusal(model="ViT-T-8-32") == ""


def test_the_optimizer(tmp_path, refusal):
    write_shard(tmp_path / "x.tar", PAIRS)
    assert "--opt must be one of adadelta," in refusal(opt="lion")
    assert "--wd-exclude 'bias' is the name of no parameter" in refusal(wd_exclude="bias")
    assert "--opt muon trains matrices, and all of them are locked" in refusal(
        "--lock-image", "--lock-text", opt="muon"
    )
    assert refusal("--lock-image", opt="muon") == ""
    assert refusal(opt="tests.clip.test_optimizers:Reading") == ""


class TestMemory:
    """Shared memory of data workers, and memory of the host."""

    BATCH = 8 * (3 * 32 * 32 + 8 * 16)  # eight images of 32 pixels in bytes, and texts of 16 ids

    @pytest.fixture(autouse=True)
    def shard(self, tmp_path):
        write_shard(tmp_path / "x.tar", PAIRS)

    def test_shared_memory(self, tmp_path, refusal, monkeypatch):
        needed, original = 3 * 2 * self.BATCH, module.free_bytes  # three workers with two batches each

        def free(path):
            return room if path == tmp_path else original(path)

        monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path)
        monkeypatch.setattr(module, "free_bytes", free)
        room = needed - 1
        line = refusal(workers=3)
        assert f"{tmp_path} has 150 KiB free, and 3 data workers hold 2 batches each of 25.0 KiB there: use" in line
        assert "--shm-size=1g" in line
        assert refusal(workers=2) == ""
        assert refusal(workers=0) == ""
        room = needed
        assert refusal(workers=3) == ""

    def test_host_memory(self, refusal, monkeypatch):
        for workers, needed in ((0, self.BATCH), (2, 5 * self.BATCH)):
            for available in (needed - 1, needed):
                monkeypatch.setattr(module, "process_memory", lambda available=available: Memory(2**40, available))
                line = refusal(workers=workers)
                said = f"of memory are available, and {2 * workers + 1} batch(es) of 25.0 KiB are held at a time: use"
                assert (said in line) == (available < needed)
        monkeypatch.setattr(module, "process_memory", lambda: None)  # where nothing says it
        assert refusal() == ""

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"batch_size": 8, "workers": 2}, "20 batch(es) of 25.0 KiB"),
            ({"global_batch_size": 64, "workers": 2}, "20 batch(es) of 25.0 KiB"),  # on eight ranks
            ({"batch_size": 8, "workers": 0}, "4 batch(es) of 25.0 KiB"),
        ],
    )
    def test_the_processes_of_a_machine_share_it(self, options, said, tmp_path, monkeypatch):
        world = World(rank=5, size=8, local_rank=1, local_size=4)
        needed = int(said.split()[0]) * self.BATCH
        given = config(f"{tmp_path}/x.tar", tmp_path / "logs", train_num_samples=64, **options)
        for available in (needed - 1, needed):
            monkeypatch.setattr(module, "process_memory", lambda available=available: Memory(2**40, available))
            is_refused = available < needed
            with pytest.raises(ValueError, match=re.escape(said)) if is_refused else contextlib.nullcontext():
                preflight(given, RunFolder(tmp_path / "logs/run"), {}, world)

    def test_shared_memory_of_the_processes_of_a_machine(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path)
        monkeypatch.setattr(module, "free_bytes", lambda _: 2**40 if world.is_main else 2 * 3 * 2 * self.BATCH - 1)
        given = config(f"{tmp_path}/x.tar", tmp_path / "logs", workers=3, batch_size=8)
        world = World(rank=1, size=2, local_rank=1, local_size=2)
        with pytest.raises(ValueError, match="and 6 data workers hold 2 batches each of "):
            preflight(given, RunFolder(tmp_path / "logs/run"), {}, world)


class TestDisk:
    """Space for checkpoints, and permission to write them."""

    @pytest.fixture(autouse=True)
    def shard(self, tmp_path):
        write_shard(tmp_path / "x.tar", PAIRS)

    @pytest.mark.parametrize(("ema_decay", "said"), [(None, "19.7 MiB"), (0.9, "26.3 MiB")])
    def test_the_estimate_is_that_of_the_files(self, tmp_path, monkeypatch, ema_decay, said):
        monkeypatch.setattr(loop, "_pictures", lambda *_: [])
        options = {"ema_decay": ema_decay, "workers": 1}
        folder, _ = train(config(f"{tmp_path}/x.tar", tmp_path / "logs", train_num_samples=8, epochs=1, **options))
        found = preflight(config(f"{tmp_path}/x.tar", tmp_path / "logs", **options), folder, {})
        size = folder.latest.stat().st_size
        assert size * 0.98 < found.checkpoint < size
        log = (folder.path / "out.log").read_text()
        assert f"8 pairs in 1 shard(s); a checkpoint takes {said} of " in log
        assert "the batches that are made ahead 50.0 KiB of memory; 4 pairs were tried" in log

    def test_space(self, tmp_path, refusal, monkeypatch):
        weights = sum(p.nbytes for p in module.bare_model(config("x", tmp_path), {}, torch.device("cpu")).parameters())
        checkpoint = 3 * weights
        for there, needed in ((0, 3 * checkpoint + weights), (1, 2 * checkpoint + weights), (2, checkpoint + weights)):
            if there:
                folder = RunFolder(tmp_path / "logs/run")
                folder.checkpoints.mkdir(parents=True, exist_ok=True)
                (folder.checkpoints / f"step_{there}.pt").touch()
            for free in (needed - 1, needed):
                monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: mock.Mock(free=free))
                options = config(f"{tmp_path}/x.tar", tmp_path / "logs", workers=0)
                if free == needed:
                    preflight(options, RunFolder(tmp_path / "logs/run"), {})
                    continue
                with pytest.raises(
                    ValueError,
                    match=r"free, and the run needs .* for each of --keep-last 2 checkpoints of .*; make room",
                ):
                    preflight(options, RunFolder(tmp_path / "logs/run"), {})
        monkeypatch.setattr(shutil, "disk_usage", lambda _: mock.Mock(free=2**20))
        preflight(options, RunFolder(tmp_path / "logs/run"), {}, World(rank=1, size=2))  # it writes nothing
        shutil.rmtree(tmp_path / "logs")
        assert f"--logs {tmp_path}/logs has 1.00 MiB free, and the run needs " in refusal(workers=0)

    def test_a_folder_that_cannot_be_written(self, tmp_path, refusal, monkeypatch):
        (tmp_path / "file").touch()
        line = refusal(logs=tmp_path / "file/logs", name="run")
        assert f"the folder {tmp_path}/file/logs/run cannot be written: Not a directory: " in line
        assert line.endswith("give a folder to --logs that can be")
        original = os.mkdir

        def refusing(path, *arguments, **options):
            if Path(path).name == "run":
                raise OSError(30, "Read-only file system", str(path))
            original(path, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", refusing)
            assert "logs/run cannot be written: Read-only file system: " in refusal(name="run")
        with monkeypatch.context() as patch:  # a disk on which folders can be made, and no files
            patch.setattr(lock, "LOCK_NAME", "none/run.lock")
            assert "logs/run cannot be written: No such file or directory: " in refusal(name="run")
        assert refusal(name="run") == ""
        assert not (tmp_path / "logs").exists()


class TestValidation:
    """Validation data that cannot be used."""

    @pytest.fixture(autouse=True)
    def shard(self, tmp_path):
        write_shard(tmp_path / "x.tar", PAIRS)

    def test_it_is_refused_and_named(self, tmp_path, refusal):
        assert "--val-data cannot be used: no such shard: v.tar" in refusal(val_data="v.tar")
        write_shard(tmp_path / "v.tar", changed(png=b"x"))
        (tmp_path / "images").mkdir()
        line = refusal(val_data=tmp_path / "v.tar")
        assert f"--val-data cannot be used: not one of the first 8 images of {tmp_path}/v.tar can be used; " in line
        assert "images has no sub-folders" in refusal(val_data=tmp_path / "images")
        write_shard(tmp_path / "v.tar", PAIRS)
        keys = {"val_data": tmp_path / "v.tar", "val_group_by": "breed"}
        assert "sample has no 'breed' in its json" in refusal(**keys)
        assert refusal(**keys | {"val_group_by": "category"}) == ""

    def test_only_its_beginning_is_looked_at(self, tmp_path, refusal, monkeypatch):
        monkeypatch.setattr(labelled, "CHECKED", 3)
        for bad, expected in ((2, ""), (3, "not one of the first 3 images of ")):
            write_shard(tmp_path / "v.tar", [*changed(png=b"x")[:bad], *PAIRS])
            assert expected in refusal(val_data=tmp_path / "v.tar")
            assert (refusal(val_data=tmp_path / "v.tar") == "") == (expected == "")


class TestGPU:
    """A GPU that is not there, or is full. Nothing here needs one: a run is refused before it is asked for more."""

    @pytest.fixture(autouse=True)
    def shard(self, tmp_path):
        write_shard(tmp_path / "x.tar", PAIRS)

    def test_it_is_not_there(self, refusal, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no GPU for 'cuda': PyTorch finds none that CUDA or ROCm can use; use cpu or" in refusal(device="cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert "no GPU for 'cuda:2': there are 2" in refusal(device="cuda:2")
        assert refusal(device="cpu") == ""

    def test_it_is_full(self, tmp_path, refusal, monkeypatch):
        weights = sum(p.nbytes for p in module.bare_model(config("x", tmp_path), {}, torch.device("cpu")).parameters())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * weights - 1, 2**36))
        line = refusal(device="cuda")
        assert "cuda has 26.3 MiB of its 64.0 GiB free, and weights, gradients and the optimizer's state of " in line
        assert "take 26.3 MiB: end what else runs there (see nvidia-smi), take another GPU" in line
        assert refusal(device="cuda", precision="pure_bf16") == ""  # takes half of it
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * weights, 2**36))
        assert refusal(device="cuda") == ""

    @pytest.mark.parametrize(("size", "fsdp", "is_refused"), [(2, True, False), (2, False, True), (1, True, True)])
    def test_each_process_has_a_part(self, size, fsdp, is_refused, tmp_path, monkeypatch):
        given = config("x", tmp_path, fsdp=fsdp)
        model = module.bare_model(given, {}, torch.device("meta"))
        weights = sum(parameter.nbytes for parameter in model.parameters())
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * weights, 2**36))
        with pytest.raises(ValueError, match="free") if is_refused else contextlib.nullcontext():
            module._check_gpu(given, model, torch.device("cuda"), World(size=size))


class TestSample:
    """Which shards and pairs are looked at."""

    def test_numbers_are_spread(self):
        assert [spread(count, 4) for count in (0, 1, 2, 4, 5, 10_000)] == [
            [], [0], [0, 1], [0, 1, 2, 3], [0, 1, 2, 4], [0, 3333, 6666, 9999],
        ]  # fmt: skip
        assert spread(7, 1) == [0]

    @pytest.fixture
    def indexed(self, monkeypatch):
        """The names of the shards that are indexed, which must all be looked for in the cache first."""
        names, original = [], index.IndexCache._make

        def make(cache, name):
            names.append(name)
            return original(cache, name)

        monkeypatch.setattr(index.IndexCache, "_make", make)
        return names

    def test_few_of_many_shards_are_indexed(self, tmp_path, indexed):
        shards = [write_shard(tmp_path / f"{number:02d}.tar", PAIRS) for number in range(10)]
        found = preflight(config(f"{tmp_path}/*.tar", tmp_path), RunFolder(tmp_path), {})
        assert indexed == [str(shards[number]) for number in (0, 3, 6, 9)]
        assert (found.tried, found.unusable) == (16, [])
        preflight(config(f"{tmp_path}/*.tar", tmp_path), RunFolder(tmp_path), {})
        assert len(indexed) == 4  # the index was kept

    def test_one_shard_that_is_elsewhere_is_brought_here(self, tmp_path, indexed):
        write_shard(tmp_path / "x.tar", PAIRS)
        name = f"pipe:cat {tmp_path}/x.tar {{0..9999}}2>/dev/null"
        found = preflight(config(name.replace("{0..9999}", "#{0..9999}"), tmp_path), RunFolder(tmp_path), {})
        assert len(indexed) == 1
        assert found.tried == 4

    def test_every_shard_of_them_is_read(self, tmp_path):
        for name, pairs in {"a": PAIRS, "b": changed(png=b"x"), "c": PAIRS}.items():
            write_shard(tmp_path / f"{name}.tar", pairs)
        found = preflight(config(f"{tmp_path}/*.tar", tmp_path), RunFolder(tmp_path), {})
        assert found.tried == 12
        assert [line.partition(":")[0] for line in found.unusable] == [f"b.tar/00{number}" for number in (0, 2, 4, 7)]

    def test_pairs_that_cannot_be_used_are_named_if_others_can(self, tmp_path):
        write_shard(tmp_path / "x.tar", [*changed(png=b"x")[:4], *PAIRS])
        found = preflight(config(f"{tmp_path}/x.tar", tmp_path), RunFolder(tmp_path), {})
        assert found.tried == 4
        assert [line.partition(":")[0] for line in found.unusable] == ["x.tar/000", "x.tar/003"]
        assert "4 pairs were tried, and 2 of them cannot be used: x.tar/000: not an image" in str(found)
