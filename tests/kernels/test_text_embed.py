"""Text embedding: the recursion of the segmented sums, ids of every kind, parameters of other dtypes, bytes."""

import functools
import itertools

import pytest
import torch

from clipfast.kernels import configs, launch, text_embed
from clipfast.kernels.text_embed import launches
from clipfast.kernels.text_embed.spec import SPECS, TextShape, small_chunks
from clipfast.verify.rule import value_and_grads

from ..conftest import DTYPES, INTERPRET, LEG
from ..numerics import compare
from .conftest import Recorded, call_at, leaves_of

pytestmark = pytest.mark.usefixtures("poison")
(SPEC,) = SPECS
SMALL = TextShape(5, 7, 11, 24)


def assert_exact(ids, vocab, width, device):
    """Check that the gradient of the table for random integers under the ids is the exact sum of these integers."""
    rows = torch.randint(-3, 4, (1, len(ids), width))
    expected = torch.zeros(vocab, width, dtype=torch.int64).index_add_(0, ids, rows[0])
    grad, text = rows.to(device, torch.float32), ids[None].to(device, torch.int32)
    actual = torch.ops.clipfast.text_embed_bwd_token(grad, text, vocab, torch.float32)
    assert torch.equal(actual, expected.to(actual)), (vocab, ids.tolist())


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
        assert_exact(ids, vocab, 20, device)


@pytest.mark.parametrize("chunk", [4, 5, 8])
def test_any_ids_in_chunks_of_any_size(chunk, device):
    small = configs.RowConfig(chunk, 8, num_warps=1, num_stages=2)
    with configs.override(configs.config_key("text_embed_bwd", torch.float32), small):
        for size in (1, chunk - 1, chunk, chunk + 1, 2 * chunk, 2 * chunk + 1, 61):
            for vocab in (1, 2, 7, 100):
                # small ids more often, as words are
                assert_exact((vocab * torch.rand(size) ** 3).long(), vocab, 5, device)


def test_launches_grow_with_the_logarithm_of_the_rows():
    # a chunk of 128 rows leaves 2, and later one of 64: from the last launch back, they have 1, 32, 32^2 ... chunks
    for batch, expected in {0: 1, 1: 1, 2: 2, 53: 2, 54: 3, 1702: 3, 1703: 4}.items():
        with launch.record_launches(90) as recorded:
            text = torch.zeros(batch, 77, dtype=torch.int32)
            grad = torch.empty(batch, 77, 1, dtype=torch.bfloat16)
            torch.ops.clipfast.text_embed_bwd_token(grad, text, 8, torch.float32)
        sizes = [len(launch.args["ids_ptr"]) for launch in recorded]
        assert len(sizes) == expected, (batch, sizes)
        assert all(after <= 2 * -(-before // 64) for before, after in itertools.pairwise(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES[1:]], ids=str)
def test_ten_thousand_times_the_same_id(dtype, device):
    # Start, end and padding are in every text: their sums must not lose small terms.
    repeats = 700 if INTERPRET else 10_000
    ids = torch.full((repeats, 1), 3, dtype=torch.int32)
    ids[repeats // 2] = 0
    grad = (torch.randn(repeats, 1, 24) + 0.1).to(device, dtype)
    actual = torch.ops.clipfast.text_embed_bwd_token(grad, ids.to(device), 5, torch.float32)
    expected = torch.zeros(5, 24, dtype=torch.float64).index_add_(0, ids[:, 0], grad[:, 0].cpu().double())
    # The sums of 10,000 numbers are about 1,000: float32 holds them to this precision in any order, 16 bits do not.
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=0)
    rounded = torch.ops.clipfast.text_embed_bwd_token(grad, ids.to(device), 5, dtype)
    assert torch.equal(rounded, actual.to(dtype))


def test_positions_that_are_not_used_get_zero(device):
    call = call_at("text_embed", SMALL, device)
    positions = call.inputs["positional_embedding"]
    result = call.results(positional_embedding=torch.cat([positions, positions[:3]]))["d_positional_embedding"]
    torch.testing.assert_close(result[:7], call.grads[0].sum(0))
    assert result[7:].tolist() == [[0.0] * 24] * 3


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float32", "float16")], ids=str)
def test_positions_of_another_dtype(dtypes, device):
    of_table, of_positions = (getattr(torch, name) for name in dtypes)
    call = call_at("text_embed", SMALL, device, of_table)
    call.inputs["positional_embedding"] = call.inputs["positional_embedding"].to(of_positions)
    compare(*call)
    result = call.results()
    assert result["value"].dtype == result["d_token_embedding"].dtype == of_table
    assert result["d_positional_embedding"].dtype == of_positions


def test_nan_stays_in_its_row(device):
    call = call_at("text_embed", SMALL, device)
    text = call.inputs["text"]
    call.inputs["token_embedding"][4, 3] = float("nan")
    call.grads[0][2, 3, 5] = float("nan")
    result = call.results()
    assert torch.equal(result["value"].isnan().any(-1), text == 4)
    assert result["d_token_embedding"].isnan().any(1).nonzero().tolist() == [[int(text[2, 3])]]


@pytest.mark.skipif(LEG == "cpu", reason="the CPU path refuses them")
def test_ids_that_are_no_rows_have_no_part_in_gradients(device):
    call = call_at("text_embed", SMALL, device)
    text = call.inputs["text"].clone()
    text[2] = torch.tensor([-1, 11, 2**31, -(2**31), 2**32, 2**32 + 3, -9])
    actual = call.results(text=text)
    call.grads[0][2] = 0
    expected = call.results()
    assert torch.equal(actual["d_token_embedding"], expected["d_token_embedding"])
    others = [0, 1, 3, 4]
    assert torch.equal(actual["value"][others], expected["value"][others])


@pytest.mark.skipif(INTERPRET, reason="CPU autocast means bfloat16, which the interpreter cannot multiply")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_autocast_reads_the_table_as_it_is(backend, device):
    op, expected, inputs, (grad,) = call_at("text_embed", SMALL, device)
    leaves = leaves_of(inputs)
    with Recorded() as record, torch.autocast(device.type, torch.bfloat16):
        x = op(**leaves, backend=backend)
    copies = [arguments for op, arguments, _ in record.calls if op is torch.ops.aten._to_copy.default]
    assert not [source for source, *_ in copies if source.shape == (11, 24)]
    # the sum is taken in float32 and rounded once
    assert torch.equal(x, expected(**inputs).to(torch.bfloat16))
    grad = grad.bfloat16()
    x.backward(grad)
    # the gradient of a float32 table is not rounded
    gradients = value_and_grads(expected, inputs, grad)
    for name in ("token_embedding", "positional_embedding"):
        torch.testing.assert_close(leaves[name].grad, gradients[f"d_{name}"])


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter counts what is loaded and stored")
@pytest.mark.parametrize("shape", [(4, 8, 128), (8, 13, 77), (1, 1, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [128, 8])
def test_every_tensor_is_read_or_written_once(chunk, shape, dtype, device, monkeypatch, moved):
    # each tile of positions has one program, which loads them once
    monkeypatch.setattr(launches, "programs_at_once", lambda *args: 1)
    batch, length, width = shape
    tokens = batch * length
    shape = TextShape(batch, length, tokens, width)
    op, _, inputs, (grad,) = call_at("text_embed", shape, device, dtype)
    # every row of the table once
    inputs["text"] = torch.randperm(tokens).view(batch, length)
    floor = functools.partial(SPEC.floor, shape, dtype.itemsize)
    small = configs.RowConfig(chunk, 256, num_warps=1, num_stages=2)
    with configs.override(configs.config_key("text_embed_bwd", dtype), small):
        x = op(**leaves_of(inputs))
        # forward leaves the ids in 32 bits
        assert sum(moved) == floor(backward=False).bytes + 4 * tokens
        moved.clear()
        x.backward(grad)
    # PyTorch sums over texts, unseen. The ids come sorted in 4 bytes, with 8 bytes for the row of each.
    by_torch = (tokens + length) * width * dtype.itemsize
    # each row of the table looks for itself among the ids, and none is cleared
    scratch, rows = 4 * tokens + 4 * tokens * (tokens.bit_length() + 1), tokens
    # all chunks but a last one leave two sums and their ids, which are written, and read again by blocks of columns
    while rows > chunk:
        rows, chunk = 2 * -(-rows // chunk), min(chunk, launches.LATER_CHUNK)
        scratch += rows * (2 * 4 * width + 4 + 4 * -(-width // launches.LATER_BLOCK_N))
    assert sum(moved) == floor(backward=True).bytes - by_torch + scratch


IDS, POS = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(5, 8)
VALID = {"text": IDS, "token_embedding": torch.zeros(9, 8), "positional_embedding": POS}
TEXT_ERRORS = [
    ({"text": IDS[0]}, r"text must be \[B, L\], got shape \(5,\)"),
    ({"token_embedding": torch.zeros(9)}, r"token_embedding must have 2 dimensions, got shape \(9,\)"),
    ({"positional_embedding": POS[1:]}, r"\[5 or more, 8\] for text .* and .* \(9, 8\), got \(4, 8\)"),
    ({"positional_embedding": torch.zeros(5, 7)}, r"must be \[5 or more, 8\] .*, got \(5, 7\)"),
]


@pytest.mark.parametrize(("changed", "message"), TEXT_ERRORS)
def test_errors(changed, message):
    with pytest.raises(ValueError, match=f"^text_embed: .*{message}"):
        text_embed(**(VALID | changed))


@pytest.mark.skipif(INTERPRET, reason="Triton runs here, and does not wait to see the ids")
@pytest.mark.parametrize("wrong", [9, -1, 2**32])
def test_id_that_is_no_row_of_the_table(wrong):
    text = IDS.clone()
    text[1, 3] = wrong
    with pytest.raises(IndexError, match=rf"text_embed: text must be ids of the 9 rows.*, got {wrong} at \(1, 3\)"):
        text_embed(**(VALID | {"text": text}))
