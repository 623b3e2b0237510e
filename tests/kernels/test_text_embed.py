"""Test the text embedding beyond its cases: segmented sums over several launches, kinds of ids, dtypes, errors."""

import pytest
import torch

from clipfast.kernels import configs, text_embed
from clipfast.kernels.text_embed.spec import SPECS, TextShape, small_chunks
from clipfast.verify.rule import value_and_grads

from ..conftest import DTYPES, INTERPRET
from ..numerics import compare
from .conftest import Recorded, call_at, leaves_of

pytestmark = pytest.mark.usefixtures("poison")
(SPEC,) = SPECS
SMALL = TextShape(5, 7, 11, 24)


def assert_exact(ids, vocab, width, device):
    """Check that the text embedding's gradient for random integers is the exact sum of these integers."""
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


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_runs_of_ids(runs, device):
    # Every second row of the table has no token. The first and the last row have tokens.
    vocab = 2 * len(runs) - 1
    ids = torch.arange(0, vocab, 2).repeat_interleave(torch.tensor(runs))
    with small_chunks(torch.float32):
        for order in (ids, ids.flip(0), ids[torch.randperm(len(ids))]):
            assert_exact(order, vocab, 20, device)


@pytest.mark.parametrize("chunk", [4, 5, 8])
def test_any_ids_in_chunks_of_any_size(chunk, triton_device):
    small = configs.RowConfig(chunk, 8, num_warps=1, num_stages=2)
    with configs.override(configs.config_key("text_embed_bwd", torch.float32), small):
        for size in (1, chunk - 1, chunk, chunk + 1, 2 * chunk + 1, 61):
            for vocab in (1, 2, 100):
                # Small ids occur more often, as frequent words do.
                assert_exact((vocab * torch.rand(size) ** 3).long(), vocab, 5, triton_device)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES[1:]], ids=str)
def test_ten_thousand_times_the_same_id(dtype, device):
    # Start, end and padding tokens are in every text, so their sums have many terms and must not lose small ones.
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


def test_ids_that_are_no_rows_have_no_part_in_gradients(triton_device):
    call = call_at("text_embed", SMALL, triton_device)
    text = call.inputs["text"].clone()
    text[2] = torch.tensor([-1, 11, 2**31, -(2**31), 2**32, 2**32 + 3, -9])
    actual = call.results(text=text)
    call.grads[0][2] = 0
    expected = call.results()
    assert torch.equal(actual["d_token_embedding"], expected["d_token_embedding"])
    others = [0, 1, 3, 4]
    assert torch.equal(actual["value"][others], expected["value"][others])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_autocast_reads_the_table_as_it_is(backend, native):
    op, expected, inputs, (grad,) = call_at("text_embed", SMALL, native)
    leaves = leaves_of(inputs)
    with Recorded() as record, torch.autocast(native.type, torch.bfloat16):
        x = op(**leaves, backend=backend)
    copies = [arguments for op, arguments, _ in record.calls if op is torch.ops.aten._to_copy.default]
    assert not [source for source, *_ in copies if source.shape == (11, 24)]
    # The sum of token embedding and position is taken in float32 and rounded once.
    assert torch.equal(x, expected(**inputs).to(torch.bfloat16))
    grad = grad.bfloat16()
    x.backward(grad)
    # the gradient of a float32 table is not rounded
    gradients = value_and_grads(expected, inputs, grad)
    for name in ("token_embedding", "positional_embedding"):
        torch.testing.assert_close(leaves[name].grad, gradients[f"d_{name}"])


IDS, POS = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(5, 8)
VALID = {"text": IDS, "token_embedding": torch.zeros(9, 8), "positional_embedding": POS}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": IDS[0]}, r"text must be \[B, L\]"),
        ({"token_embedding": torch.zeros(9)}, "token_embedding .*2 dimensions"),
        ({"positional_embedding": POS[1:]}, r"\[5 or more, 8\] .* got \(4, 8\)"),
        ({"text": IDS + 9}, r"the 9 rows.*, got 9 at \(0, 0\)"),
        ({"text": IDS - 1}, "got -1"),
        ({"text": IDS + 2**32}, f"got {2**32}"),
    ],
)
def test_errors(changed, message):
    with pytest.raises((IndexError, ValueError), match=f"^text_embed: .*{message}"):
        text_embed(**(VALID | changed))
