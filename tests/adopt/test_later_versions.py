"""Adopted models of OpenCLIP after 3.3.0: its own attention class, whose tests older versions skip, and interfaces."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

import clipfast
from clipfast.adopt import open_clip, parts

from . import shrunk


@pytest.fixture
def heads_attention(monkeypatch):
    """Return a mock that counts the calls of clipfast's attention from OpenCLIP's own attention class."""
    wrapped = mock.Mock(wraps=open_clip.heads_attention)
    monkeypatch.setattr(open_clip, "heads_attention", wrapped)
    return wrapped


@pytest.mark.parametrize("context_width", [48, 32])
def test_a_context(context_width, heads_attention):
    from open_clip.transformer import Attention

    if "k_x" not in Attention.forward.__code__.co_varnames:
        pytest.skip("this OpenCLIP is older")
    attn = shrunk.randomised(Attention(48, 2, kdim=context_width, vdim=context_width)).double()
    patched = clipfast.apply_to_open_clip(copy.deepcopy(attn))
    assert "as before:" not in clipfast.report_kernels(patched)
    x = torch.randn(3, 5, 48, dtype=torch.float64)
    one, other = torch.randn(2, 3, 7, context_width, dtype=torch.float64)
    for v_x in (one, other):
        torch.testing.assert_close(patched(x, k_x=one, v_x=v_x), attn(x, k_x=one, v_x=v_x), rtol=0, atol=1e-12)
    torch.testing.assert_close(patched(x, one, one), attn(x, one, one), rtol=0, atol=1e-12)
    # Only the last call has the same context for keys and values, so clipfast's attention runs once.
    assert heads_attention.call_count == 1


def later_text_tower():
    """Make a text tower with a mask of padding, as OpenCLIP has from version 4 on; the mask scales the tokens."""
    from open_clip.transformer import TextTransformer

    class Later(TextTransformer):
        __module__, __qualname__ = "open_clip.transformer", "TextTransformer"

        def _embeds(self, text, attention_mask=None):
            """Return a text tower's embedded tokens, scaled by the padding mask, and the causal mask."""
            x, mask = super()._embeds(text)
            return x if attention_mask is None else x * attention_mask[..., None], mask

        def forward(self, text, attention_mask=None):
            """Compute the text features of a tower of a later OpenCLIP."""
            x, mask = self._embeds(text, attention_mask=attention_mask)
            x = self.ln_final(self.transformer(x, attn_mask=mask))
            return x[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection

    return Later(context_length=9, vocab_size=40, width=48, heads=2, layers=2, output_dim=16)


def later_decoder():
    """Make MaMMUT's decoder as in OpenCLIP 4: causal captions with an image, or texts alone whose padding is masked."""
    from open_clip.transformer import ResidualAttentionBlock

    class Later(nn.Module):
        __module__, __qualname__ = "open_clip.transformer", "MultimodalDecoder"

        def __init__(self):
            super().__init__()
            self.use_pad_mask = True
            self.token_embedding = nn.Embedding(40, 48)
            self.resblocks = nn.ModuleList(ResidualAttentionBlock(48, 2) for _ in range(2))
            self.cross_attn = nn.ModuleList([ResidualAttentionBlock(48, 2, is_cross_attention=True)])
            self.register_buffer("attn_mask", torch.full((9, 9), float("-inf")).triu(1), persistent=False)

        def forward(self, text, attention_mask=None, image_embs=None):
            """Decode captions or texts as a decoder of a later OpenCLIP does."""
            x, length = self.token_embedding(text), text.shape[1]
            mask = self.attn_mask[:length, :length]
            if image_embs is None:
                hidden = torch.where(attention_mask, 0.0, float("-inf"))[:, None].expand(-1, length, -1)
                mask = hidden.repeat_interleave(2, 0).to(x.dtype)
            x = self.resblocks[0](x, attn_mask=mask)
            x = x if image_embs is None else self.cross_attn[0](x, k_x=image_embs, v_x=image_embs)
            return self.resblocks[1](x, attn_mask=mask)

    return Later()


@pytest.mark.parametrize("make", [later_text_tower, later_decoder])
def test_interfaces_of_open_clip_4(make, monkeypatch):
    ours = mock.Mock(wraps=parts.attention)
    monkeypatch.setattr(parts, "attention", ours)
    tower = shrunk.randomised(make()).double()
    tower.traits = object()  # OpenCLIP's factory sets this attribute on every model; patching must keep it
    patched = clipfast.apply_to_open_clip(copy.deepcopy(tower))
    is_decoder, length = make is later_decoder, 6 if make is later_decoder else 9
    text, valid = torch.arange(2 * length).reshape(2, -1), torch.arange(length) < torch.tensor([[4], [6]])
    image = torch.randn(2, 5, 48, dtype=torch.float64)
    calls = [{"image_embs": image}, {"attention_mask": valid}] if is_decoder else [{}, {"attention_mask": valid}]
    for options, runs_on_ours in zip(calls, (True, not is_decoder), strict=True):
        ours.reset_mock()
        torch.testing.assert_close(patched(text, **options), tower(text, **options), rtol=0, atol=1e-10)
        assert ours.called == runs_on_ours
    report = clipfast.report_kernels(patched)
    assert "takes attention_mask too" not in report
    places = {"attention", "norms"} if is_decoder else {"attention", "norms", "text_embed", "pooled_last_block"}
    assert {kind for kind, (count, _) in clipfast.adopt.count_places(patched).items() if count} >= places, report
    assert hasattr(patched, "traits")
