"""Zero-shot classification by prompts made from the class names (Radford et al. 2021, section 3.1)."""

import functools
import json
from collections.abc import Callable, Sequence
from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.progress import Progress, progress
from ..models import CLIP
from ..models.packed_text import PackedText, pack_on_host
from ..models.tokenizer import trim_padding

TEXTS = 256  # the number of texts that are encoded at once
Template = str | Callable[[str], str]


@functools.cache
def _assets() -> dict[str, tuple[str, ...]]:
    """Return OpenAI's class names and prompt templates for ImageNet, from a file of the package."""
    raw: dict[str, list[str]] = json.loads(files("clipfast").joinpath("assets/imagenet_zero_shot.json").read_text())
    return {key: tuple(value) for key, value in raw.items()}


OPENAI_IMAGENET_TEMPLATES = _assets()["templates"]
SIMPLE_IMAGENET_TEMPLATES = _assets()["simple_templates"]
IMAGENET_CLASSNAMES = _assets()["classnames"]
TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "simple": SIMPLE_IMAGENET_TEMPLATES,
    "openai": OPENAI_IMAGENET_TEMPLATES,
}


def encode_texts(
    model: CLIP, tokenizer: Callable[[list[str]], Tensor], texts: list[str], device: str | torch.device
) -> Tensor:
    """Return the normalised features [len(texts), embed_dim] of texts, such as zero-shot prompts.

    Texts are packed if the model takes packed texts and packing saves enough work. Otherwise padding is cut off if the
    model's ``reads_padding`` is False; models of other packages have no such attribute, and get all padding.
    """
    ids = tokenizer(texts)
    given: Tensor | PackedText = ids
    if isinstance(model, CLIP) and type(model).encode_text is CLIP.encode_text and model.takes_packed():
        given = pack_on_host(ids, torch.device(device))
    elif not getattr(model, "reads_padding", True):
        given = trim_padding(ids)
    return model.encode_text(given.to(device, non_blocking=True), normalize=True)


def prompts_of(classnames: Sequence[str], templates: Sequence[Template]) -> list[str]:
    """Return the prompts of each class, one for each template, class after class.

    Raises:
        ValueError: there are no classes or no templates.
    """
    if not classnames or not templates:
        raise ValueError(
            f"zero-shot classifier needs class names and templates, got {len(classnames)} and {len(templates)}"
        )
    return [t.replace("{}", name) if isinstance(t, str) else t(name) for name in classnames for t in templates]


@torch.no_grad()
def build_zero_shot_classifier(
    model: CLIP,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Template],
    num_classes_per_batch: int = 10,
    device: str | torch.device = "cpu",
    use_tqdm: bool = False,
    show: Progress | None = None,
) -> Tensor:
    """Return classifier weights: the mean of each class's prompt features, scaled to unit length.

    Args:
        model: the model, which must be in evaluation mode.
        tokenizer: the model's tokenizer, as :func:`clipfast.get_tokenizer` returns it.
        classnames: one name per class.
        templates: strings with ``{}`` in place of the name, or functions that turn a name into a prompt.
        num_classes_per_batch: number of classes to encode at once, each with all templates.
        device: the model's device.
        use_tqdm: show progress.
        show: makes the progress bar, in place of the usual one.

    Returns:
        [embed_dim, len(classnames)]; features of images @ these weights are cosine similarities.

    Raises:
        ValueError: there are no classes or no templates.
    """
    prompts = prompts_of(classnames, templates)
    weights = []
    show = show or functools.partial(progress, shown=use_tqdm)
    with show(len(classnames), "prompts of classes", "classes") as advance:
        for start in range(0, len(classnames), num_classes_per_batch):
            batch = prompts[start * len(templates) : (start + num_classes_per_batch) * len(templates)]
            features = encode_texts(model, tokenizer, batch, device).unflatten(0, (-1, len(templates)))
            weights.append(F.normalize(features.mean(1), dim=-1))
            advance(len(features))
    return torch.cat(weights).T


def top_classes(image_features: Tensor, classifier: Tensor, k: int, block: int = 4096) -> Tensor:
    """Return the ``k`` most similar zero-shot classes of each image, best first: [N, embed_dim] -> [N, k].

    Only the scores of ``block`` images are in memory at a time.
    """
    k = min(k, classifier.shape[1])
    return torch.cat([(rows @ classifier).topk(k, dim=1).indices for rows in image_features.split(block)])
