"""Test packed sequences in all ops: no sequence sees another, and wrong cumulative lengths are refused."""

import contextlib
import itertools
import random

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from clipfast.kernels import attention, attention_pool, attention_qkv, implementations, text_embed
from clipfast.kernels.launch import triton_runs_on
from clipfast.kernels.packing import Packing, pack

from ..conftest import INTERPRET
from .conftest import Recorded, needs_sanitizer

HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM


def cumulative(lengths, device="cpu"):
    """Return the cumulative lengths of packed sequences, as an op takes them."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def mixes(count):
    """Yield random lengths of packed sequences: of any kind, in runs of equal ones, all equal, all 1, and one alone."""
    draw = random.Random(0)
    for _ in range(count):
        yield [draw.randint(0, 77) for _ in range(draw.randint(1, 12))]
    yield from ([3, 3, 3, 0, 0, 7, 7, 1], [18] * 9, [77] * 3, [1] * 40, [77], [1], [0])


@pytest.mark.parametrize("causal", [False, True])
def test_each_sequence_has_the_results_of_a_call_of_its_own(causal, device):
    def alone(x):
        """Compute the attention of one sequence by the reference, so that no interpreted kernel runs for it."""
        return attention(x[None], HEADS, causal=causal, backend="torch")[0]

    for lengths in mixes(1 if INTERPRET else 12):
        ends = cumulative(lengths)
        total = int(ends[-1]) + 3
        qkv, grad = torch.randn(total, 3 * WIDTH, device=device), torch.randn(total, WIDTH, device=device)
        qkv[ends[-1] :], grad[ends[-1] :] = float("nan"), float("nan")
        found = run(lambda x: attention(x, HEADS, causal=causal, cu_seqlens=ends.to(device)), qkv, grad)  # noqa: B023
        for start, end in itertools.pairwise(ends):
            if start < end:
                own = run(alone, qkv[start:end], grad[start:end])
                torch.testing.assert_close([x[start:end] for x in found], own)
        assert not found[0][ends[-1] :].any()
        assert not found[1][ends[-1] :].any()


def run(function, x, grad):
    """Return the result and the gradient of an op on packed sequences."""
    x = x.detach().requires_grad_()
    result = function(x)
    result.backward(grad)
    return [result.detach(), x.grad]


def test_separate_tensors_are_computed_as_a_packed_projection(device):
    ends = cumulative([5, 20, 0, 3], device)
    qkv = torch.randn(28, 3 * WIDTH, device=device)
    q, k, v = qkv.view(28, 3, HEADS, HEAD_DIM).unbind(1)
    expected = attention(qkv, HEADS, causal=True, cu_seqlens=ends)
    found = attention_qkv(q, k, v, causal=True, cu_seqlens=pack(ends, 28))
    torch.testing.assert_close(found.flatten(1), expected)


def pool(query, tokens, grad, **options):
    """Return the pooled tokens, and the gradients of queries and tokens."""
    leaves = [x.detach().requires_grad_() for x in (query, tokens)]
    pooled = attention_pool(*leaves, **options)
    pooled.backward(grad)
    return [pooled.detach(), *(x.grad for x in leaves)]


@pytest.mark.usefixtures("poison")
def test_queries_pool_the_tokens_of_their_own_sequence(device):
    for way, lengths in zip(itertools.cycle((contextlib.nullcontext, Recorded)), mixes(2 if INTERPRET else 12)):
        ends = cumulative(lengths)
        query, grad = torch.randn(2, len(lengths), HEADS, WIDTH, device=device)
        tokens = torch.randn(int(ends[-1]) + 100, WIDTH, device=device)
        tokens[ends[-1] :] = float("nan")
        with way():
            pooled, d_query, d_tokens = pool(query, tokens, grad, cu_seqlens=ends.to(device), max_seqlen=77)
        for sequence, (start, end) in enumerate(itertools.pairwise(ends)):
            one = slice(sequence, sequence + 1)
            if start < end:
                own = pool(query[one], tokens[None, start:end], grad[one])
                found = [pooled[one], d_query[one], d_tokens[None, start:end]]
                torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
            else:
                assert not pooled[one].any()
                assert not d_query[one].any()
        assert not d_tokens[ends[-1] :].any()


@pytest.mark.parametrize("change", ["memory", "tensor", "packing"])
def test_lengths_that_change_are_found_again(change, device):
    values, (query, tokens) = np.array([0, 10, 30], np.int32), (torch.randn(2, 2, WIDTH), torch.randn(30, WIDTH))
    ends, qkv = torch.from_numpy(values), torch.randn(30, 3 * WIDTH)
    query, tokens, qkv = query.to(device), tokens.to(device), qkv.to(device)
    packing = pack(ends, 30)
    if change == "memory":
        values[1] = 12
    elif change == "tensor":
        ends[1] = 12
    else:
        packing.cu_seqlens[1] = 12
        packing.bounds.copy_(pack(cumulative([12, 18]), 30).bounds)
        ends = packing.cu_seqlens
    expected = attention_pool(query, tokens, cu_seqlens=cumulative([12, 18], device), max_seqlen=30)
    assert torch.equal(attention_pool(query, tokens, cu_seqlens=ends.to(device), max_seqlen=30), expected)
    if change == "packing":
        expected = attention(qkv, HEADS, cu_seqlens=cumulative([12, 18], device))
        found = attention(qkv, HEADS, cu_seqlens=Packing(*(x.to(device) for x in packing)))
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_sequence_longer_than_said(backend, device):
    query, tokens, grad = (
        torch.randn(n, *size, device=device) for n, *size in ((2, HEADS, WIDTH), (60, WIDTH), (2, HEADS, WIDTH))
    )
    ends = cumulative([5, 50], device)
    if not triton_runs_on(device):
        for way in (contextlib.nullcontext, Recorded):
            with (
                way(),
                pytest.raises(
                    ValueError, match="no sequence may be longer than max_seqlen=16, got 50 tokens at sequence 1"
                ),
            ):
                attention_pool(query, tokens, cu_seqlens=ends, max_seqlen=16, backend=backend)
        return
    # The host does not read the lengths, since it would wait for the GPU. So only the first tokens of a sequence count.
    found = pool(query, tokens, grad, cu_seqlens=ends, max_seqlen=16, backend=backend)
    expected = pool(query[1:], tokens[None, 5:21], grad[1:])
    torch.testing.assert_close([found[0][1:], found[1][1:], found[2][None, 5:21]], expected, rtol=1e-5, atol=1e-5)
    assert not found[2][21:].any()


def test_one_plan_serves_packed_tokens_of_any_number(device):
    plans = {}
    for lengths in ([3, 9], [20, 1]):
        ends, most = cumulative(lengths, device), max(lengths)
        query, grad = torch.randn(2, 2, HEADS, WIDTH, device=device)
        tokens = torch.randn(sum(lengths) + 2, WIDTH, device=device)
        args = query, tokens[None], ends
        pooled, lse = implementations.compute(plans, implementations.attention_pool_fwd, "", *args, most)
        found = implementations.compute(plans, implementations.attention_pool_bwd, "", grad, *args, lse, most)
        expected = pool(query, tokens, grad, cu_seqlens=ends, max_seqlen=most)
        torch.testing.assert_close([pooled, found[0], found[1][0]], expected, rtol=0, atol=0)


def test_compiled_pooling_serves_all_lengths(native):
    torch.compiler.reset()
    backend, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(
        lambda query, tokens, ends, most: attention_pool(query, tokens, cu_seqlens=ends, max_seqlen=most),
        backend=backend, fullgraph=True,
    )  # fmt: skip
    for lengths in ([3, 4], [7, 2], [30, 4], [1, 1], [11, 40]):
        args = cumulative(lengths, native), max(lengths)
        query = torch.randn(2, HEADS, WIDTH, device=native, requires_grad=True)
        tokens = torch.randn(sum(lengths) + 2, WIDTH, device=native, requires_grad=True)
        results = compiled(query, tokens, *args), attention_pool(query, tokens, cu_seqlens=args[0], max_seqlen=args[1])
        found, expected = ([x, *torch.autograd.grad(x.sum(), (query, tokens))] for x in results)
        torch.testing.assert_close(found, expected)
        counts.append(backend.frame_count)
    assert counts[1:] == [counts[1]] * 4  # the second call makes the numbers of tokens variable


# Wrong cumulative lengths of two sequences with nine tokens, each by a pattern for its error.
WRONG = {
    r"must be \[(B \+ 1|3)\], got shape \(0,\)": torch.zeros(0, dtype=torch.int32),
    r"must be \[(B \+ 1|3)\], got shape \(1, 2\)": torch.zeros(1, 2, dtype=torch.int32),
    "must run from 0 to 9 tokens at most, got 1 to 9": torch.tensor([1, 2, 9], dtype=torch.int32),
    "must run from 0 to 9 tokens at most, got 0 to 10": torch.tensor([0, 5, 10], dtype=torch.int32),
    "must not fall, got 3 after 5 at sequence 1": torch.tensor([0, 5, 3], dtype=torch.int32),
    "must be an int32 tensor, got int64": torch.tensor([0, 5, 9]),
    "must be an int32 tensor, or the result of": Packing(*torch.zeros(3, 9)),
    "are of 8 tokens on cpu, got 9 tokens": pack(torch.tensor([0, 5, 8], dtype=torch.int32), 8),
}


def attend(cu_seqlens):
    """Call the op for attention on nine packed tokens."""
    return attention(torch.randn(9, 3 * WIDTH), HEADS, cu_seqlens=cu_seqlens)


def embed(cu_seqlens):
    """Call the op for the embedding of text on nine packed tokens."""
    return text_embed(torch.zeros(9, dtype=torch.int64), torch.randn(5, 8), torch.randn(9, 8), cu_seqlens=cu_seqlens)


def pool_two(cu_seqlens):
    """Call the op for attention pooling with two queries on nine packed tokens."""
    return attention_pool(torch.randn(2, 1, 8), torch.randn(9, 8), cu_seqlens=cu_seqlens, max_seqlen=8)


@pytest.mark.parametrize("message", WRONG)
def test_wrong_cumulative_lengths_are_refused(message):
    for op, call in (("attention", attend), ("text_embed", embed), ("attention_pool", pool_two)):
        call(pack(cumulative([5, 4]), 9))  # the op knows this layout now, and checks less in later calls
        with pytest.raises((ValueError, TypeError), match=f"{op}: cu_seqlens {message}"):
            call(WRONG[message])


def test_other_wrong_inputs_are_refused():
    ends = torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="seqlens and cu_seqlens exclude each other"):
        attention(torch.randn(9, 3 * WIDTH), HEADS, cu_seqlens=ends, seqlens=torch.tensor([9]))
    with pytest.raises(ValueError, match="q, k and v must be \\[T, H, D\\], all of one shape"):
        attention_qkv(torch.randn(9, 2, 8), torch.randn(8, 2, 8), torch.randn(8, 2, 8), cu_seqlens=ends)
    with pytest.raises(IndexError, match="a text has 9 tokens, more than 7 positions"):
        text_embed(torch.zeros(9, dtype=torch.int64), torch.randn(5, 8), torch.randn(7, 8), cu_seqlens=ends)
    query, tokens, nine = torch.randn(1, 2, 8), torch.randn(9, 8), {"max_seqlen": 9}
    for error, message, options in (
        (ValueError, "seqlens and cu_seqlens exclude each other", {"seqlens": torch.tensor([9]), **nine}),
        (TypeError, "must be given together, max_seqlen as an int, got Tensor and NoneType", {}),
        (TypeError, "max_seqlen as an int, got Tensor and Tensor", {"max_seqlen": torch.tensor(9)}),
        (TypeError, "max_seqlen as an int, got NoneType and int", {"cu_seqlens": None, "max_seqlen": 9}),
        (ValueError, "max_seqlen must not be negative, got -1", {"max_seqlen": -1}),
        (
            ValueError,
            r"cu_seqlens must be \[2\], got shape \(3,\)",
            {"cu_seqlens": cumulative([5, 4]), "max_seqlen": 9},
        ),
        (ValueError, "from 0 to 9 .* got 0 to 10", {"cu_seqlens": pack(cumulative([10]), 10).cu_seqlens, **nine}),
        (ValueError, "cu_seqlens is on meta, but tokens is on cpu", {"cu_seqlens": ends.to("meta"), **nine}),
        (ValueError, "at most 64 queries and 1024 tokens, got 2 and 1025", {"max_seqlen": 1025}),
    ):
        with pytest.raises(error, match=f"attention_pool: .*{message}"):
            attention_pool(query, tokens, **{"cu_seqlens": ends, **options})
    with pytest.raises(
        ValueError,
        match="query must be \\[B, H, C\\] and tokens \\[T, C\\] with cu_seqlens, got \\(1, 2, 8\\) and \\(9, 7\\)",
    ):
        attention_pool(query, tokens[:, :7], cu_seqlens=ends, max_seqlen=9)


GARBAGE = [-5, 3, 99], [7, 2, 9], [2**31 - 1, -(2**31), 4]


@needs_sanitizer
def test_pooling_of_garbage_on_a_gpu_leads_nowhere_outside(sanitizer):
    query, tokens, grad = torch.randn(2, 1, 8), torch.randn(9, 8), torch.randn(2, 1, 8)
    for values in GARBAGE:
        pool(query, tokens, grad, cu_seqlens=torch.tensor(values, dtype=torch.int32), max_seqlen=4)


def test_garbage_on_a_gpu_leads_nowhere_outside():
    for values in GARBAGE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("clipfast.kernels.packing.host_reads", lambda _: False)
            bounds = pack(torch.tensor(values, dtype=torch.int32), 9).bounds
        assert bounds.min() >= 0
        assert bounds.max() <= 9
