"""Tasks of ``clipfast eval`` on three processes: rank 0 prints what a single process prints, and the others nothing."""

import pytest

from ..processes import run_ranks
from .eval_commands import as_rank, printed, split
from .test_compositional import write_sugar_crepe

# Batches of 8 or 16 images are shared unevenly, and one of 64 leaves two ranks without images.
TASKS = """
zeroshot --data {one} --templates simple --batch-size 8
retrieval --data {one} --batch-size 64
probe --train-data {one} --data {other} --label-by category --solver torch --C 1 --shots 1 --seeds 1 --batch-size 8
compositional --data shapes:50 --batch-size 8
compositional --data {tmp}/crepe --batch-size 8
robustness --data {one} --shift other={other} --synthetic hue --batch-size 16
overlap --data {one} --train-data {other} --by pixels --batch-size 8
overlap --data {one} --train-data {other} --by model --batch-size 64
bias --data {one} --group-by category --min-count 5 --added-labels {tmp}/added.tsv --queries {tmp}/queries.txt --k 9
"""


@pytest.mark.long
def test_three_ranks_print_what_one_prints(model, shards, tmp_path, capsys):
    write_sugar_crepe(tmp_path / "crepe")
    (tmp_path / "added.tsv").write_text("crime\tthief\nanimal\tgorilla\n")
    (tmp_path / "queries.txt").write_text("a doctor\na thing\n")
    one, other = shards.split("::")
    tasks = [[*split(line, one=one, other=other, tmp=tmp_path), *model] for line in TASKS.strip().splitlines()]
    alone = [(0, printed(capsys, *words, "--device", "cpu")[0], "") for words in tasks]
    commands = [["eval", *words, "--device", "cpu"] for words in tasks]
    found = run_ranks(as_rank, 3, 3, commands, folder=tmp_path, timeout=300)
    assert found == [alone, *[[(0, "", "")] * len(tasks)] * 2]
