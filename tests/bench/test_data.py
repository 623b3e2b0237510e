"""Test the benchmarks of the data pipeline: all stages run, agree on pixels and ids, and are summed up as cores."""

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
from clipfast.bench.suites.data import STAGES
from clipfast.bench.supply import supply
from clipfast.models.tokenizer import Tokenizer

from .conftest import CPU, quickly


def tiny(stage, **sizes):
    """Return a small benchmark case of a stage of the data pipeline."""
    return build("data", {**SUITES["data"].smallest, "stage": stage, **sizes}, "fp32", CPU)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_and_what_mixes_up_its_samples_is_refused(stage):
    built = tiny(stage)
    timings = quickly(built)
    if stage == "transfer":
        assert {timing.refused for timing in timings.values()} == {"missing: nothing is copied to a CPU"}
        return
    timed = [timing for timing in timings.values() if not (timing.refused or "").startswith("missing: ")]
    assert [timing.refused for timing in timed] == [None] * len(timed)
    assert {timing.timer for timing in timed} == {"cpu_seconds"}
    right = built.ours.make()

    class Faulty:
        def observe(self, **inputs):
            """Return the results of a stage of the benchmarked data pipeline with mixed-up samples."""
            return {name: value.roll(1, 0) for name, value in right.observe(**inputs).items()}

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
        """Make a benchmark candidate for the data pipeline whose batches have a fault."""
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


def test_photographs_and_captions_are_like_those_of_the_web():
    files = pairs.jpegs(2, 512, 512)
    assert {Image.open(io.BytesIO(file)).size for file in files} == {(512, 512)}
    assert all(1.2 < 8 * len(file) / 512**2 < 2.5 for file in files)  # bits per pixel
    texts = pairs.captions(400)
    assert len(set(texts)) == 400
    tokens = [len(Tokenizer().encode(text)) for text in texts]
    assert 12 < np.mean(tokens) < 24
    assert max(tokens) > 40


def test_cpu_seconds_count_processes_that_have_ended_but_not_waiting():
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
    """Return a result of ``stage`` in which each of the named candidates takes the given seconds for 100 pairs."""
    candidates = [{"name": name, "samples_s": [s] if s else [], "median_s": s} for name, s in seconds.items()]
    shape = {"stage": stage, "width": 512, "height": 512, "size": size}
    return {"suite": "data", "shape": shape, "items": {"count": 100}, "candidates": candidates}


def test_the_summary_counts_cores():
    cases = [
        measured("read", {OURS: 0.01}),
        measured("decode", {OURS: 0.1, "OpenCLIP": 0.2}),
        measured("resize", {OURS: 0.05}),
        measured("transfer", {OURS: 0.01}),
        measured("pipeline", {OURS: 0.18, f"{OURS}, 1 worker": 0.2, "OpenCLIP": 0.4, "OpenCLIP, 1 worker": 0.5}),
        measured("decode", {OURS: 0.3}, size=384),
    ]
    small, large = supply(cases, 1000, cores=4)
    rows = {line.split("  ")[1].strip(): line.split() for line in small.splitlines()[2:7]}
    assert {name: row[-1] for name, row in rows.items()} == {
        "read": "0.1", "decode": "1.0", "resize": "0.5", "the rest": "0.4", "together": "2.0",
    }  # fmt: skip
    assert rows["decode"][1:] == ["1,000", "50%", "1.0"]
    for expected in ("decode limits; 2 data workers", "supply 2,000 pairs/s", "5.0 cores, 2.50 times", "takes 10.0%"):
        assert expected in small
    assert "3 data workers" in large


def test_the_command_prints_the_summary(no_roofs, tmp_path, capsys):
    shape = "stage=decode images=2 width=64 height=48 size=32"
    options = ["--device", "cpu", "--smoke", "--json", str(tmp_path / "r.json")]
    assert cli.main(["data", "--shape", shape, "--pairs-per-second", "500", *options]) == 0
    assert "data workers at 500 pairs/s, photographs 64x48 for 32x32" in capsys.readouterr().out


@pytest.mark.parametrize(("sizes", "message"), [({"stage": "resample"}, "stage"), ({"images": 300}, "images .* 300")])
def test_bad_shapes(sizes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{"stage": "pipeline", **sizes})
