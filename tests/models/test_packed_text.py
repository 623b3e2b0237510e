"""Test that a model has the features, the loss and all gradients of padded texts also with packed texts."""

import contextlib

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from clipfast import CLIP, contrastive_loss, create_model, pack_texts
from clipfast.kernels.launch import record_launches
from clipfast.models import CLIPConfig, TextConfig, VisionConfig
from clipfast.models import clip as clip_module
from clipfast.models import transformer as transformer_module
from clipfast.models.packed_text import PackedText, pack_if_shorter, pack_on_host

LENGTH, END = 24, 99
# The lengths of the texts of a batch in tokens; an empty caption has 2, the start and the end token.
MIXES = {
    "random": torch.randint(1, LENGTH + 1, (13,), generator=torch.Generator().manual_seed(3)).tolist(),
    "equal": [7] * 5,
    "shortest": [1] * 6,
    "longest": [LENGTH] * 4,
    "one": [9],
    "empty captions": [2, 24, 2, 2],
}


def model_of(kind="vit", dtype=torch.float64):
    """Return a small model with a text tower of 24 tokens."""
    torch.manual_seed(0)
    resnet = VisionConfig(64, (1, 1, 1, 1), 16, 32, patch_size=None)
    vision = VisionConfig(32, 2, 64, 32, patch_size=16) if kind == "vit" else resnet
    text = TextConfig(context_length=LENGTH, vocab_size=END + 1, width=48, heads=3, layers=3)
    model = CLIP(CLIPConfig(32, vision, text)).to(dtype)
    for p in model.parameters():  # biases begin as zeros, and a missing one would not be noticed
        torch.nn.init.normal_(p, std=0.2)
    return model


def texts_of(lengths):
    """Return token ids of texts with these lengths. Ids behind the end-of-text token are not zero."""
    texts = torch.randint(1, END - 1, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(1))
    for text, length in zip(texts, lengths, strict=True):
        text[length - 1] = END
    return texts


def results(model, texts):
    """Return the features of texts, their loss beside images, and the gradients of all parameters."""
    model.zero_grad()
    side = model.visual.image_size
    output = model(torch.randn(len(texts), 3, side, side, dtype=model.logit_scale.dtype), texts)
    loss = contrastive_loss(*output)
    # The sum makes the gradient of a single pair, whose loss is 0, other than zero.
    (loss + (output[1] * torch.linspace(0, 1, output[1].shape[1], dtype=loss.dtype)).sum()).backward()
    return {"features": output[1].detach(), "loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same(found, expected, tolerance):
    """Check that each result differs from the expected one by at most ``tolerance`` times its largest value."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max().clamp(min=1e-3), name


def both(model, lengths, **options):
    """Return the features, loss and gradients for padded texts of these lengths, and for the same texts packed."""
    texts, found = texts_of(lengths), []
    for one in (texts, pack_texts(texts, **options)):
        model.pack_text = False
        torch.manual_seed(5)
        found.append(results(model, one))
    return found


@pytest.mark.parametrize("lengths", MIXES.values(), ids=MIXES)
def test_packed_texts_change_nothing(lengths):
    model = model_of().eval()
    for for_gpu in (False, True):
        expected, found = both(model, lengths, for_gpu=for_gpu)
        assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("how", ["resnet", "modules", "recompute", "selective", "profiler", "torch", "compiled"])
def test_packed_texts_change_nothing_in_any_way_to_compute_a_block(how, monkeypatch):
    model = model_of("resnet" if how == "resnet" else "vit")
    if how == "modules":
        monkeypatch.setattr(transformer_module, "whole_blocks", lambda *_: {})
    elif how in ("recompute", "selective"):
        model.set_grad_checkpointing(selective=how == "selective")
    elif how == "torch":
        model.set_backend("torch")
    elif how == "compiled":
        model.encode_text = torch.compile(model.encode_text, backend="aot_eager", fullgraph=True)
    with torch.profiler.profile() if how == "profiler" else contextlib.nullcontext():
        expected, found = both(model, MIXES["random"])
    assert_same(found, expected, 1e-12)


@pytest.fixture
def seen(monkeypatch):
    """Return a list to which each call of a text tower adds the class of its texts, packed or not."""
    seen, embed = [], clip_module.embed_text
    watched = lambda table, positions, text, backend: seen.append(type(text)) or embed(table, positions, text, backend)  # noqa: E731
    monkeypatch.setattr(clip_module, "embed_text", watched)
    return seen


def test_texts_are_packed_where_much_is_padding_and_nothing_watches_the_tower(seen):
    model = model_of()
    short, long = texts_of([5] * 4), texts_of([LENGTH] * 4)

    def is_packed(text=short):
        """Return whether the model packs texts, after a check that their features are those of padded ones."""
        features = model.encode_text(text)
        model.pack_text = False
        torch.testing.assert_close(features, model.encode_text(text))
        del model.pack_text
        return seen[-2] is PackedText

    assert is_packed()
    assert not is_packed(long)
    with torch.profiler.profile():
        assert is_packed()
    handle = model.transformer.resblocks[1].mlp.c_fc.register_forward_hook(lambda *_: None)
    assert not is_packed()
    handle.remove()
    assert is_packed()
    for watch in (model.token_embedding.register_forward_hook, register_module_forward_hook):
        handle = watch(lambda *_: None)
        assert not is_packed()
        handle.remove()
    assert is_packed()


def replace_block(model):
    """Replace a block of the text tower by another module, as a user may."""
    model.transformer.resblocks[1] = torch.nn.Sequential(model.transformer.resblocks[1])


def replace_mlp(model):
    """Replace an MLP of the text tower by a module that mixes tokens."""
    mlp = model.transformer.resblocks[1].mlp
    model.transformer.resblocks[1].mlp = torch.nn.Sequential(mlp, Cumulative())


class Cumulative(torch.nn.Module):
    """Sum the tokens up to each token, which packed texts would do across texts."""

    def forward(self, x):
        """Return the sums of tokens [B, N, width]."""
        return x.cumsum(1)


def patch_norm(model):
    """Replace the ``forward`` of a layer norm in the text tower."""
    model.transformer.resblocks[1].ln_2.forward = lambda x: x


def see_all(model):
    """Let tokens see those behind them, so that the padding of a text changes its features."""
    for block in model.transformer.resblocks:
        block.attn.causal = False


def prompted(model):
    """Let the first tokens of each text be learned prompts."""

    class Prompted(CLIP):
        """A model with learned prompts."""

        def embed_text(self, text):
            """Return the embeddings of tokens, of which the first is a prompt."""
            x = super().embed_text(text).clone()
            x[:, 0] = 1.0
            return x

    model.__class__ = Prompted


@pytest.mark.parametrize(
    "change", [replace_block, replace_mlp, patch_norm, see_all, prompted, lambda model: model.set_backend("torch")]
)
def test_a_changed_tower_gets_its_texts_padded(seen, change):
    model = model_of()
    change(model)
    model.encode_text(texts_of([5] * 4))
    assert seen == [torch.Tensor]


@pytest.mark.parametrize("counts", [(4, 6), (6, 4)])
def test_batches_of_as_many_tokens_have_the_launches_of_their_number_of_texts(counts):
    model = model_of(dtype=torch.float32)
    first, second = (pack_texts(texts_of([5] * count), for_gpu=True) for count in counts)
    assert len(first.ids) == len(second.ids)
    found = []
    for batches in ([second], [first, second]):
        with record_launches(90, 132) as launches:
            for batch in batches:
                launches.clear()
                model.encode_text(batch).sum().backward()
            found.append([(one.kernel.__name__, one.grid, numbers_of(one)) for one in launches])
    assert found[0] == found[1]


def numbers_of(launch):
    """Return the arguments of a launch of a text tower that are numbers."""
    return {name: value for name, value in launch.args.items() if isinstance(value, int)}


def test_the_default_device_is_not_that_of_the_lengths():
    model, texts = model_of(), texts_of(MIXES["random"])
    expected = model.encode_text(texts)
    with torch.device("meta"):
        torch.testing.assert_close(model.encode_text(texts), expected)


def test_the_lora_of_a_linear_layer_takes_packed_texts(seen):
    model = model_of()
    mlp = model.transformer.resblocks[0].mlp
    mlp.c_fc = torch.nn.Sequential(mlp.c_fc, torch.nn.Tanh())
    texts = texts_of(MIXES["random"])
    found = model.encode_text(texts)
    assert seen == [PackedText]
    model.pack_text = False
    torch.testing.assert_close(found, model.encode_text(texts), rtol=0, atol=1e-12)


def test_packing_keeps_each_text_up_to_its_end_token_and_rounds_up_for_a_gpu():
    texts = texts_of(MIXES["random"])
    packed = pack_texts(texts)
    starts = packed.packing.cu_seqlens
    for text, place, length in zip(texts, packed.order, MIXES["random"], strict=True):
        assert packed.ids[starts[place] : starts[place + 1]].equal(text[:length])
    assert len(packed.ids) == sum(MIXES["random"])
    assert len(pack_texts(texts, for_gpu=True).ids) == -(-sum(MIXES["random"]) // 64) * 64
    assert len(packed) == len(texts)


def test_the_second_occurrence_of_the_end_token_is_not_read():
    texts = texts_of([4, 6])
    texts[:, 10] = END
    assert pack_texts(texts).packing.cu_seqlens.tolist() == [0, 6, 10]


def test_another_token_than_that_of_the_largest_id_may_be_the_last():
    texts = texts_of([4, 6])
    assert pack_texts(texts, last=torch.tensor([1, 20])).packing.cu_seqlens.tolist() == [0, 21, 23]
    for wrong in (torch.tensor([1]), torch.tensor([1, LENGTH]), torch.tensor([-1, 2])):
        with pytest.raises(ValueError, match="last must be a place in each text"):
            pack_texts(texts, last=wrong)


def test_tensors_without_values_are_not_packed():
    texts = texts_of([5] * 4)
    assert isinstance(pack_if_shorter(texts), PackedText)
    assert pack_if_shorter(texts.to("meta")).shape == texts.shape
    assert torch.compile(pack_if_shorter, backend="eager", fullgraph=True)(texts).shape == texts.shape


def test_texts_are_packed_on_the_host_where_that_pays_or_always():
    even, cpu, gpu = texts_of([8] * 4), torch.device("cpu"), torch.device("meta")  # "meta" stands for a GPU
    assert pack_on_host(even, cpu).equal(even[:, :8])
    assert len(pack_on_host(even, cpu, always=True).ids) == 32
    assert len(pack_on_host(texts_of([5, 9, 3, 12]), cpu).ids) == 29
    assert pack_on_host(even, gpu).equal(even[:, :8])
    assert len(pack_on_host(texts_of([LENGTH] * 4), gpu, always=True).ids) == 128
    assert len(pack_on_host(texts_of([LENGTH] * 400), gpu).ids) == 9600


def test_an_id_outside_the_table_is_reported_at_its_text_and_position():
    texts = texts_of([4, 9, 6])
    texts[2, 3] = -1
    for given in (texts, pack_texts(texts), pack_texts(texts, for_gpu=True)):
        with pytest.raises(IndexError, match=r"ids of the 100 rows of token_embedding, got -1 at \(2, 3\)"):
            model_of().encode_text(given)


def test_wrong_texts_are_refused():
    model = model_of()
    with pytest.raises(ValueError, match="packed from 30 columns"):
        model.encode_text(pack_texts(torch.zeros(2, 30, dtype=torch.long)))
    with pytest.raises(TypeError, match="got a list"):
        pack_texts([[1, 2]])
    with pytest.raises(TypeError, match="got a PackedText"):
        model.forward_intermediates(text=pack_texts(texts_of([3, 4])))
    changed = model_of()
    replace_block(changed)
    with pytest.raises(TypeError, match="a Sequential in the text tower"):
        changed.encode_text(pack_texts(texts_of([3, 4])))
    for wrong in (torch.zeros(3, 0, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long), torch.zeros(4).long()):
        with pytest.raises(ValueError, match="pack_texts: texts must be"):
            pack_texts(wrong)
    siglip = create_model("ViT-B-16-SigLIP", device="meta")
    with pytest.raises(TypeError, match="reads padding"):
        siglip.encode_text(pack_texts(texts_of([3, 4])))
