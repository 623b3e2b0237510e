"""The plan of a NaFlex run's batches: a token budget, sequence lengths drawn by seed, and pairs in any stretch."""

import numpy as np
import pytest

from clipfast.data import BudgetedBatches, EqualBatches, TokenBudget
from clipfast.data.batch_plan import BLOCK

SEQ_LENS = (128, 256, 576, 784, 1024)  # sequence lengths of OpenCLIP


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(("max_tokens", "divisor"), [(16384, 8), (4096 * 7, 12), (9000, 1)])
def test_a_batch_has_as_many_pairs_as_in_open_clip(max_tokens, divisor, processes):
    naflex_dataset = pytest.importorskip("timm.data.naflex_dataset")
    budget = TokenBudget(SEQ_LENS, max_tokens=max_tokens, divisor=divisor, processes=processes)
    for seq_len in SEQ_LENS:
        theirs = naflex_dataset.calculate_naflex_batch_size(max_tokens, seq_len, divisor=divisor)
        assert budget.pairs(seq_len) == theirs * processes
        assert budget.pairs(seq_len) * seq_len <= max_tokens * processes


def test_fewer_pairs_than_the_divisor_are_as_many_as_fit():
    # If fewer pairs fit than the divisor, OpenCLIP takes one pair per process.
    assert TokenBudget((1024,), max_tokens=4096, divisor=8, processes=2).pairs(1024) == 2 * 4


def test_any_batch_stands_by_itself():
    budget = TokenBudget((16, 64, 100), (1, 2, 1), (8, 16), max_tokens=1000, divisor=2, processes=2)
    plan, count = BudgetedBatches(budget, 5), 3 * BLOCK + 7
    whole = [plan[number] for number in range(count)]
    pairs = np.array([batch.pairs for batch in whole])
    tokens = pairs * [batch.seq_len for batch in whole]
    assert [batch.first for batch in whole] == [0, *pairs.cumsum()[:-1]]
    assert tokens.max() == plan.most_tokens <= 2000
    assert pairs.max() == plan.largest
    for number in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, count - 1):
        assert BudgetedBatches(budget, 5)[number] == whole[number]
        for unit, amounts in (("pairs", pairs), ("tokens", tokens)):
            other, before = BudgetedBatches(budget, 5), int(amounts[:number].sum())
            found = other.batches_for(before + 1, unit), other.batches_for(before, unit), other.before(number, unit)
            assert found == (number + 1, number, before)
    assert [BudgetedBatches(budget, 6)[number] for number in range(99)] != whole[:99]
    equal = EqualBatches(8)
    assert [equal[2], equal.before(3), equal.batches_for(16), equal.batches_for(17)] == [(16, 8, None, None), 24, 2, 3]


def test_draws_have_their_weights():
    plan = BudgetedBatches(TokenBudget((10, 20, 40), (1.0, 0.0, 3.0), (8, 16), max_tokens=400, divisor=1), 0)
    drawn = [plan[number] for number in range(4 * BLOCK)]
    both = np.zeros((3, 2))
    for batch in drawn:
        both[(10, 20, 40).index(batch.seq_len), (8, 16).index(batch.patch_size)] += 1 / len(drawn)
    # Shares have standard deviations below 0.004. Sequence length and patch size of a batch are drawn independently.
    assert abs(both - np.outer([0.25, 0, 0.75], [0.5, 0.5])).max() < 0.02
    assert (both[1] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_lens": ()}, "must be at least 1"),
        ({"seq_lens": (16, 0)}, "must be at least 1"),
        ({"divisor": 0}, "must be at least 1"),
        ({"seq_len_probs": (1.0,)}, r"one of \[16, 64\] needs a weight for each, got \[1.0\]"),
        ({"patch_sizes": (8, 16), "patch_size_probs": (0.0, 0.0)}, r"needs a weight for each, got \[0.0, 0.0\]"),
        ({"max_tokens": 63}, "budget of 63 tokens has no room for an image of 64"),
    ],
)
def test_impossible_budget(options, message):
    with pytest.raises(ValueError, match=message):
        TokenBudget(**{"seq_lens": (16, 64)} | options)


def test_ranks_that_do_not_divide_a_batch():
    budget = TokenBudget((16, 64), max_tokens=512, divisor=4, processes=3)
    assert [budget.pairs(seq_len) for seq_len in budget.seq_lens] == [96, 24]
    for ranks in (1, 2, 4, 6, 12):
        budget.refuse_ranks(ranks)
    with pytest.raises(ValueError, match=r"24 pairs, whose images have up to 64 patches, .* among 16 proc"):
        budget.refuse_ranks(16)
