"""All metrics of a model on a labelled set: zero-shot accuracy, overall and by group, and retrieval both ways."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..io.progress import Progress, progress
from ..kernels import contrastive_loss
from ..models import CLIP
from .features import LabelledFeatures
from .retrieval import pair_ranks, recall_at
from .zero_shot import TEXTS, Template, build_zero_shot_classifier, encode_texts, prompts_of, top_classes


@dataclasses.dataclass
class Evaluation:
    """The metrics of an evaluation, as in ``results.json``, and the zero-shot predictions from which they follow."""

    results: dict[str, Any]
    predictions: list[list[str]]  # the five best classes of each image, the best first
    right: list[list[bool]]  # True for each prediction that is right


def evaluate(
    model: CLIP,
    tokenizer: Callable[[list[str]], Tensor],
    images: LabelledFeatures,
    templates: Sequence[Template] = ("{}",),
    *,
    classnames: Sequence[str] | None = None,
    leave_out: Iterable[str] = (),
    skipped: int = 0,
    loss_batch: int | None = None,
    show: Progress = progress,
) -> Evaluation:
    """Compute zero-shot accuracy and retrieval of ``model``, which must be in evaluation mode.

    Args:
        model, tokenizer: encode the texts.
        images: the labelled set, encoded by the same model.
        templates: prompt templates; their features are averaged for each class.
        classnames: the name of each class in prompts, in the order of ``images.classnames``; default: the labels.
        leave_out: groups to leave out of a second overall accuracy.
        skipped: the number of unusable images of the set, for the results.
        loss_batch: also compute the mean contrastive loss of batches of this size, as OpenCLIP does.
        show: makes the progress bar of encoding the texts.

    Raises:
        ValueError: the number of names differs from the number of classes, a group to leave out does not exist, or no
            group would remain.
    """
    names, device = names_of(images.classnames, classnames), images.features.device
    captions = distinct_captions(images)
    # With only one template, the prompt of a class is often also the caption of its images. Such a text is encoded only
    # once, for retrieval and for the classifier.
    prompts = prompts_of(names, templates) if len(templates) == 1 else []
    numbers = {text: number for number, text in enumerate(dict.fromkeys([*captions, *prompts]))}
    encoded = _encoded(model, tokenizer, list(numbers), device, show)
    if prompts:
        classifier = encoded[[numbers[prompt] for prompt in prompts]].T
    else:  # with several templates, prompts are encoded only a few classes at a time, to save memory
        at_once = TEXTS // len(templates) + 1
        classifier = build_zero_shot_classifier(model, tokenizer, names, templates, at_once, device, show=show)
    best = top_classes(images.features, classifier, 5)
    found = figures(images, best, encoded[: len(captions)], leave_out=leave_out, skipped=skipped)
    if loss_batch is not None:
        texts = encoded[[numbers[own[0]] for own in images.captions]]
        found.results["clip_val_loss"] = _loss(images.features, texts, model.logit_scale.detach().exp(), loss_batch)
    return found


def names_of(labels: list[str], classnames: Sequence[str] | None) -> list[str]:
    """Return the name of each class for zero-shot prompts: the given names, or else the labels.

    Raises:
        ValueError: the number of names is not that of classes, or the names are the labels in another order.
    """
    names = labels if classnames is None else list(classnames)
    if len(names) != len(labels):
        order = f"{', '.join(labels[:5])}{', ...' * (len(labels) > 5)}"
        raise ValueError(
            f"{len(names)} class names for {len(labels)} classes: give one for each, in this order: {order}"
        )
    theirs, ours = ([name.lower().replace("_", " ") for name in one] for one in (names, labels))
    if theirs != ours and sorted(theirs) == sorted(ours):  # each name would silently stand for another class
        name, label = next((names[place], labels[place]) for place in range(len(ours)) if theirs[place] != ours[place])
        raise ValueError(
            f"the class names are the labels in another order: {name!r} would name the class {label!r}; sort them as "
            "the labels are, or leave them out"
        )
    return names


def distinct_captions(images: LabelledFeatures) -> list[str]:
    """Return the distinct first captions of the images, as the texts of retrieval, in order of first occurrence."""
    return list(dict.fromkeys(texts[0] for texts in images.captions))


def figures(
    images: LabelledFeatures, best_classes: Tensor, texts: Tensor, *, leave_out: Iterable[str] = (), skipped: int = 0
) -> Evaluation:
    """Return zero-shot accuracy and retrieval recall, as :func:`evaluate` does, from features.

    Args:
        images: the labelled set.
        best_classes: [N, 5], the indices of the five best classes of each image, the best first.
        texts: the features of the texts that :func:`distinct_captions` returns.
        leave_out, skipped: as :func:`evaluate` takes them.

    Raises:
        ValueError: a group to leave out does not exist, or no group would remain.
    """
    labels = images.classnames
    best = [[labels[index] for index in row] for row in best_classes.tolist()]
    accepted = images.accepted()
    right = [[label in names for label in row] for row, names in zip(best, accepted, strict=True)]
    # For each image, the position of the first right class among its five best classes. If none of them is right, it is
    # the number of all classes.
    hits = torch.tensor([row.index(True) if True in row else len(labels) for row in right])
    groups = sorted(set(images.groups) - {""})
    left_out = sorted(set(leave_out))
    unknown = set(left_out) - set(groups)
    if unknown or (groups and left_out == groups):
        raise ValueError(
            f"cannot leave out {', '.join(sorted(unknown) or left_out)}; groups are: {', '.join(groups) or 'none'}"
        )
    results: dict[str, Any] = {"images": len(best), "skipped_images": skipped, "classes": len(labels)}
    results["zero_shot"] = _accuracy(hits)
    if groups:
        of_group = {group: torch.tensor([own == group for own in images.groups]) for group in groups}
        results["by_group"] = {group: _accuracy(hits[members]) for group, members in of_group.items()}
    if left_out:
        kept = hits[torch.tensor([group not in left_out for group in images.groups])]
        results["without"] = {"groups": left_out, "zero_shot": _accuracy(kept)}
    results["retrieval"] = _retrieval(images, texts)
    return Evaluation(results, best, right)


def _accuracy(hits: Tensor) -> dict[str, float | int]:
    """Return zero-shot top-1 and top-5 accuracy; ``hits`` [N] has the rank of each image's right class, from 0."""
    return {"top1": (hits < 1).double().mean().item(), "top5": (hits < 5).double().mean().item(), "images": len(hits)}


@torch.no_grad()
def _encoded(
    model: CLIP, tokenizer: Callable[[list[str]], Tensor], texts: list[str], device: str | torch.device, show: Progress
) -> Tensor:
    """Return the model's features [len(texts), embed_dim] of captions and prompts, with a progress bar."""
    parts = []
    with show(len(texts), "texts", "texts") as advance:
        for start in range(0, len(texts), TEXTS):
            parts.append(encode_texts(model, tokenizer, texts[start : start + TEXTS], device))
            advance(len(parts[-1]))
    return torch.cat(parts)


def _retrieval(images: LabelledFeatures, features: Tensor) -> dict[str, dict[str, float]]:
    """Return the recall of text-to-image and image-to-text retrieval; equal texts, or images, count as one."""
    device = images.features.device
    numbers = {text: number for number, text in enumerate(distinct_captions(images))}
    text_keys = torch.tensor([numbers[texts[0]] for texts in images.captions], device=device)
    texts = features[text_keys]
    image_keys = torch.tensor(images.twins, device=device)
    return {
        "text_to_image": recall_at(pair_ranks(texts, images.features, text_keys, image_keys)),
        "image_to_text": recall_at(pair_ranks(images.features, texts, image_keys, text_keys)),
    }


def _loss(images: Tensor, texts: Tensor, logit_scale: Tensor, size: int) -> float:
    """Return the mean contrastive loss of pairs of features [N, D] in batches of ``size`` pairs (``clip_val_loss``)."""
    batches = zip(images.float().split(size), texts.float().split(size), strict=True)
    return sum(len(image) * contrastive_loss(image, text, logit_scale).item() for image, text in batches) / len(images)
