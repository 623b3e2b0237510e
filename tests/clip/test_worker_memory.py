"""Data workers neither gather memory nor files, however many samples they make."""

import os
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from clipfast.data import CroppedImages, Mix, Order, PairBatches, expand_shards, open_shards, pair_loader
from clipfast.tokenizer import Tokenizer

from .conftest import sample, write_shard
from .test_data import children

SAMPLES, BATCH, EVERY = 50_000, 100, 10  # read memory after every so many batches
WARM_UP = 2  # readings


def reading(pid):
    """Kilobytes of a process without the memory that it shares, where batches under way lie; and its open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = {key: value.split() for key, _, value in (line.partition(":") for line in status.splitlines())}
    return sum(int(fields[name][0]) for name in ("RssAnon", "RssFile")), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
def test_memory_and_files_stay_the_same(tmp_path):
    for number in range(8):
        write_shard(tmp_path / f"{number}.tar", [sample(index) for index in range(250)])
    source = open_shards(expand_shards(f"{tmp_path}/*.tar"))
    made = PairBatches([source], Mix([Order(source.sizes, 0)], [1], 0), CroppedImages(32), Tokenizer(), BATCH)
    readings, before = defaultdict(list), children()
    for number, _ in enumerate(pair_loader(made, 0, SAMPLES // BATCH, 2), start=1):
        if number % EVERY == 0:
            for pid in {os.getpid(), *(children() - before)}:
                readings[pid].append(reading(pid))
    assert len(readings) == 3
    for process in readings.values():
        memory, files = zip(*process[WARM_UP:], strict=True)
        assert max(memory) < 1.02 * memory[0]
        assert min(memory) > 0.98 * memory[0]
        # a batch under way has files, so that single readings differ
        assert abs(statistics.mean(files[-10:]) - statistics.mean(files[:10])) < 5
