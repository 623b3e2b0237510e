"""The stages of the data pipeline: all of them run, are held to the same pixels and ids, and add up to cores."""

import io
import os
import time

import numpy as np
import pytest
from PIL import Image

from clipfast.bench import cli, harness
from clipfast.bench.case import OURS, Candidate
from clipfast.bench.machine import cpu_seconds
from clipfast.bench.suites import SUITES, build, pairs, pipelines
from clipfast.bench.suites.stages import STAGES
from clipfast.bench.supply import supply
from clipfast.tokenizer import Tokenizer

from .conftest import CPU, quickly


def tiny(stage, **sizes):
    return build("data", {**SUITES["data"].smallest, "stage": stage, **sizes}, "fp32", CPU)


def without_open_clip(timings):
    return {name: timing for name, timing in timings.items() if not (timing.refused or "").startswith("missing: ")}


@pytest.mark.long
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "transfer"])
def test_every_stage_runs_and_agrees(stage):
    timings = quickly(tiny(stage))
    assert {name: timing.refused for name, timing in without_open_clip(timings).items() if timing.refused} == {}
    assert {timing.timer for timing in without_open_clip(timings).values()} == {"cpu_seconds"}
    assert timings[OURS].samples
    assert len(timings) > 1
    if stage in ("read", "pipeline"):  # OpenCLIP's package alone is not enough
        pytest.importorskip("pandas")
    pytest.importorskip("open_clip")
    assert timings["OpenCLIP transform" if stage == "decode_and_transform" else "OpenCLIP"].samples


def test_nothing_is_copied_to_a_cpu():
    timings = quickly(tiny("transfer"))
    assert {timing.refused for timing in timings.values()} == {"missing: nothing is copied to a CPU"}


@pytest.mark.parametrize("stage", ["read", "decode", "resize", "crop", "collate", "tokenize", "decode_and_transform"])
def test_a_stage_that_mixes_up_its_samples_is_refused(stage):
    built = tiny(stage)
    right = built.ours.make()

    class Faulty:
        def observe(self, order):
            return {name: value.roll(1, 0) for name, value in right.observe(order).items()}

    faulty = harness.Timing(Candidate("faulty", Faulty))
    harness.pass_gate(built, [faulty])
    assert "wrong: value is off by" in faulty.refused


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        (lambda images, texts: (images // 2, texts), "value"),
        (lambda images, texts: (images, texts.flip(0)[:1].expand_as(texts)), "texts"),
    ],
    ids=["darker", "a caption several times"],
)
def test_a_pipeline_is_held_to_colours_and_to_all_texts(fault, wrong):
    built = tiny("pipeline")

    def make():
        made = built.ours.make()
        batches = made.batches
        made.batches = lambda: (fault(*batch) for batch in batches())
        return made

    timing = harness.Timing(Candidate("faulty", make))
    harness.pass_gate(built, [timing])
    assert f"wrong: {wrong} is off by" in timing.refused


@pytest.mark.long
def test_a_pass_of_both_pipelines_has_every_pair_once():
    pytest.importorskip("pandas")
    pytest.importorskip("open_clip")
    candidates = {candidate.name: candidate.make() for candidate in tiny("pipeline", images=12).candidates}
    expected = sorted(Tokenizer()(pairs.captions(12)).tolist())
    for name, made in candidates.items():
        texts = [row for _, ids in made.batches() for row in pipelines.padded(ids).tolist()]
        assert sorted(texts) == expected, name


@pytest.mark.long
def test_phases_of_the_pipeline():
    (phases,) = {name: t.phases for name, t in quickly(tiny("pipeline")).items() if name == OURS}.values()
    assert set(phases) == {"read", "decode", "tokenize", "other"}


def test_photographs_have_the_bytes_of_photographs():
    files = pairs.jpegs(2, 512, 512)
    assert {Image.open(io.BytesIO(file)).size for file in files} == {(512, 512)}
    assert all(1.2 < 8 * len(file) / 512**2 < 2.5 for file in files)  # bits per pixel


def test_captions_have_the_length_of_captions():
    texts = pairs.captions(400)
    assert texts == pairs.captions(400)
    assert len(set(texts)) == 400
    tokenizer = Tokenizer()
    tokens = [len(tokenizer.encode(text)) for text in texts]
    assert 12 < np.mean(tokens) < 24
    assert max(tokens) > 40
    assert sum(not text.isascii() for text in texts) == 20


def test_cpu_seconds_count_threads_and_processes_that_have_ended_but_not_waiting():
    before = cpu_seconds()
    time.sleep(0.2)
    assert cpu_seconds() - before < 0.1
    pid = os.fork()
    if pid == 0:
        start = time.process_time()
        while time.process_time() - start < 0.2:
            pass
        os._exit(0)
    os.waitpid(pid, 0)
    assert cpu_seconds() - before > 0.19


def measured(stage, seconds, size=224):
    """A result of ``stage`` that takes each of the named candidates some seconds for 100 pairs."""
    candidates = [{"name": name, "samples_s": [s] if s else [], "median_s": s} for name, s in seconds.items()]
    shape = {"stage": stage, "width": 512, "height": 512, "size": size}
    return {"suite": "data", "shape": shape, "items": {"count": 100}, "candidates": candidates}


def test_the_summary_counts_cores():
    cases = [
        measured("read", {OURS: 0.01}),
        measured("decode", {OURS: 0.1, "OpenCLIP": 0.2}),
        measured("resize", {OURS: 0.05}),
        measured("transfer", {OURS: None}),
        measured("pipeline", {OURS: 0.18, f"{OURS}, 1 worker": 0.2, "OpenCLIP": 0.4, "OpenCLIP, 1 worker": 0.5}),
        measured("decode", {OURS: 0.3}, size=384),
    ]
    small, large = supply(cases, 1000, cores=4)
    rows = {line.split("  ")[1].strip(): line.split() for line in small.splitlines()[2:7]}
    assert {name: row[-1] for name, row in rows.items()} == {
        "read": "0.1", "decode": "1.0", "resize": "0.5", "the rest": "0.4", "together": "2.0",
    }  # fmt: skip
    assert rows["decode"][1:] == ["1,000", "50%", "1,000", "1.0"]
    assert "decode limits; 2 data workers are needed" in small
    assert "4 core(s), as many as this machine has, supply 2,000 pairs/s" in small
    assert "OpenCLIP's pipeline takes 5.0 cores, 2.50 times as many: 5 CPU seconds for 1,000 pairs, ours 2" in small
    assert "nothing is copied to a GPU" in small
    assert "384x384" in large
    assert "3 data workers" in large


def test_the_copy_to_a_gpu_has_its_share():
    (found,) = supply([measured("decode", {OURS: 0.1}), measured("transfer", {OURS: 0.001})], 10_000)
    assert "the copy to the GPU takes 10.0% of the time" in found


def test_the_command_prints_the_summary(no_roofs, tmp_path, capsys):
    shape = "stage=decode images=2 width=64 height=48 size=32"
    options = ["--device", "cpu", "--smoke", "--no-plots", "--json", str(tmp_path / "r.json")]
    assert cli.main(["data", "--pairs-per-second", "0", *options]) == 2
    assert "--pairs-per-second must be more than 0, got 0.0" in capsys.readouterr().err
    assert cli.main(["data", "--shape", shape, "--pairs-per-second", "500", *options]) == 0
    assert "data workers at 500 pairs/s, photographs 64x48 for 32x32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"stage": "resample"}, "stage must be one of read, decode, "),
        ({"images": 300}, "images must be a multiple of the batch of 256, got 300"),
    ],
)
def test_bad_shapes(sizes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{"stage": "pipeline", **sizes})
