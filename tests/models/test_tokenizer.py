"""Test that CLIP's tokenizer gives OpenCLIP's ids for any Unicode text."""

import pickle
import string

import pytest
import torch

from clipfast import get_tokenizer, tokenize
from clipfast.models.tokenizer import Tokenizer

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
TOKENIZER = Tokenizer()
# Texts that need cleaning: entities, mojibake, ligatures, wide letters, control characters, odd white space,
# lone surrogates.
AWKWARD = st.sampled_from(
    ["&amp;", "&amp;lt;", "&#39;", "&eacute;", "Ã©", "â€™", "ﬁ", "ａｂ", "ſ", "İ", "\x00", "\x1b[1m", "\x85", "\u2028",
     "\u3000", "\r\n", "\ud800", "it's", "I'LL", "'ſ", "٣", "Ⅳ", "½", "👨‍👩‍👧", "日本語", "e\u0301", "“q”",
     "_", "~", "@", "é", "<start_of_text>", "<end_of_text>"]
)  # fmt: skip
TEXT = st.lists(st.one_of(AWKWARD, st.text(max_size=8), st.text(string.printable, max_size=12)), max_size=6).map(
    "".join
)


@pytest.fixture(scope="module")
def theirs():
    """Return OpenCLIP's own tokenizer."""
    return pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()


@hypothesis.settings(max_examples=700, deadline=None)
@hypothesis.given(text=TEXT)
@hypothesis.example(text="a &amp;amp; b")
def test_same_ids_as_open_clip(theirs, text):
    assert TOKENIZER.encode(text) == theirs.encode(text)


def test_every_character_of_the_basic_plane(theirs):
    for start in range(0, 0x10000, 64):
        text = " ".join(f"a{chr(code)}b" for code in range(start, start + 64))
        assert TOKENIZER.encode(text) == theirs.encode(text), hex(start)


def test_batch_layout(theirs):
    texts = ["a cat", "", "x " * 200]
    ids = tokenize(texts)
    assert ids.shape == (3, 77)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, theirs(texts))
    assert ids[1, :3].tolist() == [49406, 49407, 0]
    assert ids[2, -1] == 49407


def test_lengths():
    assert tokenize("a cat on a mat", context_length=4).tolist() == [[49406, 320, 2368, 49407]]
    assert tokenize([]).shape == (0, 77)
    assert get_tokenizer("ViT-B-32")("a cat").shape == (1, 77)
    with pytest.raises(ValueError, match="text has 5 tokens, 2 fit into context_length=4: 'a cat on a mat'"):
        tokenize("a cat on a mat", context_length=4, truncate=False)
    with pytest.raises(ValueError, match="context_length must hold at least"):
        Tokenizer(1)


@pytest.mark.parametrize("bad", [None, 3, b"bytes", ["nested"]])
def test_not_a_string(bad):
    with pytest.raises(TypeError, match="text must be a string, got "):
        tokenize(["fine", bad])


def test_decode():
    assert TOKENIZER.decode(TOKENIZER.encode("Hello, wörld 日本!")) == "hello , wörld 日本 ! "
    assert TOKENIZER.decode(tokenize("hi")[0, :3]) == "<start_of_text>hi <end_of_text>"


def test_travels_to_other_processes():
    copy = pickle.loads(pickle.dumps(Tokenizer(12)))
    assert copy.context_length == 12
    assert copy.encode("a cat") == TOKENIZER.encode("a cat")
