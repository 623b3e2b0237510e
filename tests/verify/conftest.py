"""Small cases, so that a run of the checks takes a second."""

import pytest

from clipfast.verify import shapes
from clipfast.verify.block_shapes import ActShape, NormShape, PairShape, PoolShape
from clipfast.verify.cases import ACCURACY, DETERMINISM, EVERYWHERE, Case
from clipfast.verify.loss_shapes import LossShape, QueueShape, SigmoidShape, ViewShape
from clipfast.verify.shapes import AttentionShape, PatchShape, TextShape

SMALL = {
    "contrastive_loss": [Case(LossShape(21, 24, 20.0, 0.3), "small", draws=6)],
    "sigmoid_loss": [Case(SigmoidShape(21, 24, 20.0, -3.0, 0.3), "small", draws=6)],
    "info_nce_loss": [Case(QueueShape(21, 30, 24, 20.0, 0.3, True), "small", draws=6)],
    "nt_xent_loss": [Case(ViewShape(21, 24, 20.0, 0.3), "small", draws=6)],
    "attention": [Case(AttentionShape(2, 9, 2, 16, True), "small")],
    "patch_embed": [Case(PatchShape(2, 16, 24, 8, 20, False), "small")],
    "layer_norm": [Case(NormShape(19, 24, True), "small")],
    "layer_norm_pair": [Case(PairShape(19, 24), "small")],
    "bias_gelu": [Case(ActShape(19, 24), "small")],
    "bias_quick_gelu": [Case(ActShape(19, 24, True), "small")],
    "attention_pool": [Case(PoolShape(2, 3, 7, 24), "small")],
    "text_embed": [Case(TextShape(4, 9, 5, 20), "small")],
}
GRADIENTS = {
    "contrastive_loss": ["d_image", "d_text", "d_logit_scale"],
    "sigmoid_loss": ["d_image", "d_text", "d_logit_scale", "d_logit_bias"],
    "info_nce_loss": ["d_query", "d_key", "d_negatives", "d_logit_scale"],
    "nt_xent_loss": ["d_first", "d_second", "d_logit_scale"],
    "attention": ["d_qkv", "d_bias"],
    "patch_embed": ["d_images", "d_weight", "d_class_embedding", "d_positional_embedding"],
    "layer_norm": ["d_x", "d_weight", "d_bias", "d_residual"],
    "layer_norm_pair": ["d_x", "d_weight_1", "d_bias_1", "d_weight_2", "d_bias_2"],
    "bias_gelu": ["d_x", "d_bias"],
    "bias_quick_gelu": ["d_x", "d_bias"],
    "attention_pool": ["d_query", "d_tokens"],
    "text_embed": ["d_token_embedding", "d_positional_embedding"],
}


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each op at one small case, and bitwise repeats of it."""
    for op, cases in SMALL.items():
        repeated = Case(cases[0].shape, "again", EVERYWHERE, DETERMINISM)
        assert cases[0].check == ACCURACY
        monkeypatch.setitem(shapes.CASES, op, [*cases, repeated])
