"""Text embedding: the recursion of the segmented sums, ids of every kind, parameters of other dtypes, bytes."""

import functools
import itertools

import pytest
import torch

from clipfast.kernels import configs, launch, reference, text_embed
from clipfast.kernels.text_embed import launches
from clipfast.kernels.text_embed.spec import SPECS, TextShape, small_chunks

from ..conftest import DTYPES, INTERPRET, LEG
from ..numerics import compare, value_and_grads
from .conftest import Recorded, inputs_of

pytestmark = pytest.mark.usefixtures("poison")
(SPEC,) = SPECS


def call(shape, dtype, device):
    """Ids, a table and positions, and a gradient."""
    return inputs_of("text_embed", TextShape(*shape), dtype, device)


def sums_of(ids, vocab, width, dtype, device):
    """Return the gradient of the table for random integers under the ids, and the exact sums of these integers."""
    rows = torch.randint(-3, 4, (1, len(ids), width))
    expected = torch.zeros(vocab, width, dtype=torch.int64).index_add_(0, ids, rows[0])
    grad, text = rows.to(device, dtype), ids[None].to(device)
    return torch.ops.clipfast.text_embed_bwd_token(grad, text, vocab, dtype), expected.to(device, dtype)


RUNS = {
    "one id": [65],
    "a chunk each": [4] * 9,
    "ends at the ends of chunks": [1, 3, 2, 2, 4, 8, 3, 1, 12, 4],
    "over three chunks": [2, 9, 1, 3, 14, 2],
    "over three chunks, from end to end": [4, 12, 4, 16, 1],
    "over a chunk and one row to each side": [3, 6, 3, 5, 7, 10],
    "all different": [1] * 37,
    "pairs across ends": [1, *[2] * 20],
    "one after many": [64, 1],
    "many after one": [1, 64],
    "a few rows": [2, 1],
}


@pytest.mark.parametrize("order", ["sorted", "reversed", "shuffled"])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_runs_of_ids(runs, order, device):
    # every second row of the table has no token, the first and the last row have some
    vocab = 2 * len(runs) - 1
    ids = torch.arange(0, vocab, 2).repeat_interleave(torch.tensor(runs))
    ids = {"sorted": ids, "reversed": ids.flip(0), "shuffled": ids[torch.randperm(len(ids))]}[order]
    with small_chunks(torch.float32):
        actual, expected = sums_of(ids, vocab, 20, torch.float32, device)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("chunk", [4, 5, 8])
def test_any_ids_in_chunks_of_any_size(chunk, device):
    small = configs.RowConfig(chunk, 8, num_warps=1, num_stages=2)
    with configs.override(configs.config_key("text_embed_bwd", torch.float32), small):
        for size in (1, chunk - 1, chunk, chunk + 1, 2 * chunk, 2 * chunk + 1, 61):
            for vocab in (1, 2, 7, 100):
                # small ids more often, as words are
                ids = (vocab * torch.rand(size) ** 3).long()
                actual, expected = sums_of(ids, vocab, 5, torch.float32, device)
                assert torch.equal(actual, expected), (size, vocab, ids.tolist())


def test_launches_grow_with_the_logarithm_of_the_rows():
    # each chunk of 128 rows leaves 2: the launches have 1, 64, 64^2 ... chunks
    for batch, expected in {0: 1, 1: 1, 2: 2, 106: 2, 107: 3, 6808: 3, 6809: 4}.items():
        with launch.record_launches(90) as recorded:
            text = torch.zeros(batch, 77, dtype=torch.int64)
            grad = torch.empty(batch, 77, 1, dtype=torch.bfloat16)
            torch.ops.clipfast.text_embed_bwd_token(grad, text, 8, torch.float32)
        sizes = [len(launch.args["ids_ptr"]) for launch in recorded]
        assert len(sizes) == (expected if batch else 0), (batch, sizes)
        assert all(after <= 2 * -(-before // 128) for before, after in itertools.pairwise(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES[1:]], ids=str)
def test_ten_thousand_times_the_same_id(dtype, device):
    # Start, end and padding are in every text: their sums must not lose small terms.
    repeats = 700 if INTERPRET else 10_000
    ids = torch.full((repeats, 1), 3)
    ids[repeats // 2] = 0
    grad = (torch.randn(repeats, 1, 24) + 0.1).to(device, dtype)
    actual = torch.ops.clipfast.text_embed_bwd_token(grad, ids.to(device), 5, torch.float32)
    expected = torch.zeros(5, 24, dtype=torch.float64).index_add_(0, ids[:, 0], grad[:, 0].cpu().double())
    # The sums of 10,000 numbers are about 1,000: float32 holds them to this precision in any order, 16 bits do not.
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=0)
    rounded = torch.ops.clipfast.text_embed_bwd_token(grad, ids.to(device), 5, dtype)
    assert torch.equal(rounded, actual.to(dtype))


@pytest.mark.parametrize("spare", [0, 3])
def test_positions_that_are_not_used_get_zero(spare, device):
    inputs, grad = call((3, 5, 7, 12), torch.float32, device)
    positions = inputs["positional_embedding"]
    inputs["positional_embedding"] = torch.cat([positions, positions[:spare]])
    result = value_and_grads(text_embed, inputs, grad)["d_positional_embedding"]
    torch.testing.assert_close(result[:5], grad.sum(0))
    assert result[5:].tolist() == [[0.0] * 12] * spare


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float32", "float16")], ids=str)
def test_positions_of_another_dtype(dtypes, device):
    of_table, of_positions = (getattr(torch, name) for name in dtypes)
    inputs, grad = call((3, 7, 11, 24), of_table, device)
    inputs["positional_embedding"] = inputs["positional_embedding"].to(of_positions)
    compare(text_embed, reference.text_embed, inputs, grad)
    result = value_and_grads(text_embed, inputs, grad)
    assert result["value"].dtype == result["d_token_embedding"].dtype == of_table
    assert result["d_positional_embedding"].dtype == of_positions


def test_the_same_text_again_and_again(device):
    # ids of stride 0, and a gradient of one row for all tokens
    inputs, grad = call((3, 7, 11, 24), torch.float32, device)
    inputs["text"] = inputs["text"][:1].expand(3, 7)
    assert text_embed(**inputs).is_contiguous()
    compare(text_embed, reference.text_embed, inputs, grad[:, :1].expand(grad.shape))


def test_nan_stays_in_its_row(device):
    inputs, grad = call((5, 7, 11, 24), torch.float32, device)
    inputs["token_embedding"][4, 3] = float("nan")
    grad[2, 3, 5] = float("nan")
    result = value_and_grads(text_embed, inputs, grad)
    assert torch.equal(result["value"].isnan().any(-1), inputs["text"] == 4)
    assert result["d_token_embedding"].isnan().any(1).nonzero().tolist() == [[int(inputs["text"][2, 3])]]


@pytest.mark.skipif(LEG == "cpu", reason="the CPU path refuses them")
def test_ids_that_are_no_rows_have_no_part_in_gradients(device):
    inputs, grad = call((5, 7, 11, 24), torch.float32, device)
    wrong = torch.tensor([-1, 11, 2**31, -(2**31), 2**32, 2**32 + 3, -9]).to(device)
    expected_grad = grad.clone()
    expected_grad[2] = 0
    expected = value_and_grads(text_embed, inputs, expected_grad)
    text = inputs["text"].clone()
    text[2] = wrong
    actual = value_and_grads(text_embed, inputs | {"text": text}, grad)
    assert torch.equal(actual["d_token_embedding"], expected["d_token_embedding"])
    others = [0, 1, 3, 4]
    assert torch.equal(actual["value"][others], expected["value"][others])


@pytest.mark.skipif(INTERPRET, reason="CPU autocast means bfloat16, which the interpreter cannot multiply")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_autocast_reads_the_table_as_it_is(backend, device):
    inputs, grad = call((3, 7, 11, 24), torch.float32, device)
    leaves = {name: x.requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    with Recorded() as record, torch.autocast(device.type, torch.bfloat16):
        x = text_embed(**leaves, backend=backend)
    assert not [
        args for op, args in record.calls if op is torch.ops.aten._to_copy.default and args[0].shape == (11, 24)
    ]
    # the sum is taken in float32 and rounded once
    assert torch.equal(x, reference.text_embed(**inputs).to(torch.bfloat16))
    grad = grad.bfloat16()
    x.backward(grad)
    # the gradient of a float32 table is not rounded
    expected = value_and_grads(reference.text_embed, inputs, grad.float())
    for name in ("token_embedding", "positional_embedding"):
        torch.testing.assert_close(leaves[name].grad, expected[f"d_{name}"])


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter counts what is loaded and stored")
@pytest.mark.parametrize("shape", [(4, 8, 128), (8, 13, 77), (1, 1, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [128, 8])
def test_every_tensor_is_read_or_written_once(chunk, shape, dtype, device, monkeypatch, moved):
    # each tile of positions has one program, which loads them once
    monkeypatch.setattr(launches, "programs_at_once", lambda *args: 1)
    batch, length, width = shape
    tokens = batch * length
    inputs, grad = call((batch, length, tokens, width), dtype, device)
    # every row of the table once
    inputs["text"] = torch.randperm(tokens).view(batch, length)
    floor = functools.partial(SPEC.floor, TextShape(batch, length, tokens, width), dtype.itemsize)
    small = configs.RowConfig(chunk, 256, num_warps=1, num_stages=2)
    leaves = {name: x.requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    with configs.override(configs.config_key("text_embed_bwd", dtype), small):
        x = text_embed(**leaves)
        assert sum(moved) == floor(backward=False).bytes
        moved.clear()
        x.backward(grad)
    # PyTorch sums over texts, unseen. The ids come sorted in 4 bytes, with 8 bytes for the row of each.
    by_torch = (tokens + length) * width * dtype.itemsize
    # all chunks but a last one leave two sums and their ids, which are written and read again
    scratch, rows = 4 * tokens, tokens
    while rows > chunk:
        rows = 2 * -(-rows // chunk)
        scratch += 2 * rows * (4 * width + 4)
    assert sum(moved) == floor(backward=True).bytes - by_torch + scratch


IDS = torch.zeros(2, 5, dtype=torch.int64)
POS = torch.zeros(5, 8)
VALID = {"text": IDS, "token_embedding": torch.zeros(9, 8), "positional_embedding": POS}
TEXT_ERRORS = [
    ({"text": torch.zeros(2, 5)}, TypeError, "text must be an int32 or int64 tensor, got float32"),
    ({"text": IDS.bool()}, TypeError, "text must be an int32 or int64 tensor, got bool"),
    ({"text": IDS[0]}, ValueError, r"text must be \[B, L\], got shape \(5,\)"),
    ({"token_embedding": torch.zeros(9)}, ValueError, r"token_embedding must have 2 dimensions, got shape \(9,\)"),
    (
        {"positional_embedding": POS[1:]},
        ValueError,
        r"\[5 or more, 8\] for text .* and .* \(9, 8\), got \(4, 8\)",
    ),
    ({"positional_embedding": torch.zeros(5, 7)}, ValueError, r"must be \[5 or more, 8\] .*, got \(5, 7\)"),
]


@pytest.mark.parametrize(("changed", "error", "message"), TEXT_ERRORS, ids=[case[2][:40] for case in TEXT_ERRORS])
def test_errors(changed, error, message):
    with pytest.raises(error, match=f"text_embed: .*{message}"):
        text_embed(**(VALID | changed))


@pytest.mark.skipif(INTERPRET, reason="Triton runs here, and does not wait to see the ids")
@pytest.mark.parametrize("wrong", [9, -1, 2**32])
def test_id_that_is_no_row_of_the_table(wrong):
    text = IDS.clone()
    text[1, 3] = wrong
    with pytest.raises(IndexError, match=rf"text_embed: text must be ids of the 9 rows.*, got {wrong} at \(1, 3\)"):
        text_embed(**(VALID | {"text": text}))
