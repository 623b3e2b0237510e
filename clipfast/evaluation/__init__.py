"""Evaluation of a checkpoint without training on the task: zero-shot classification and image-text retrieval."""

from .evaluate import Evaluation, evaluate
from .labelled import LabelledFeatures, LabelledImage, encode_labelled, read_labelled
from .retrieval import pair_ranks, recall_at
from .zero_shot import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    SIMPLE_IMAGENET_TEMPLATES,
    TEMPLATES,
    build_zero_shot_classifier,
    top_classes,
)

__all__ = [
    "IMAGENET_CLASSNAMES",
    "OPENAI_IMAGENET_TEMPLATES",
    "SIMPLE_IMAGENET_TEMPLATES",
    "TEMPLATES",
    "Evaluation",
    "LabelledFeatures",
    "LabelledImage",
    "build_zero_shot_classifier",
    "encode_labelled",
    "evaluate",
    "pair_ranks",
    "read_labelled",
    "recall_at",
    "top_classes",
]
