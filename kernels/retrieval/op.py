"""Ranks for recall@k, in blocks: the M x N scores of images and texts are never all in memory.

With features x [M, D], y [N, D], scores s_ij = x_i . y_j, and o_j the image that text j belongs to:

    text rank_j  = #{i : i != o_j, not s_ij < s_(o_j)j}
    image rank_i = #{j : o_j != i, not s_ij < b_i}        b_i = max over o_j = i of s_(o_j)j

A tie makes the rank worse, and so does NaN, since no comparison with it holds. For ties to be exact, a score must have
the same bits in every place where it is computed. Therefore the scores of texts with their own images are computed in
tiles of the same shape and arithmetic as all others; the images are gathered so that the pairs lie on the diagonal.

FLOPs: 2 M N D, and 2 N T D for the scores with the own images, where T is the side of a tile. Memory beyond the inputs:
O(M + N), and on the CPU a few tiles.
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import registered, uses_reference
from ..checks import check_device, check_float, check_integers, check_like, check_tensor
from ..launch import triton_runs_on
from . import cpu, launches


def _check_indices(op: str, text_image: Tensor, num_images: int) -> None:
    """Refuse an index of ``text_image`` that belongs to no image.

    On a GPU the check would have to wait for the device; there a text with a wrong index counts as having no image.
    """
    if text_image.device.type != "cpu" or text_image.numel() == 0:
        return
    least, most = text_image.aminmax()
    if least < -1 or most >= num_images:
        wrong = (text_image < -1) | (text_image >= num_images)
        place = int(wrong.int().argmax())
        raise ValueError(
            f"{op}: text_image must hold indices of the {num_images} images, or -1 for a text of none, "
            f"got {text_image[place].item()} at {place}"
        )


@registered("retrieval_ranks")
def _retrieval_ranks(image: Tensor, text: Tensor, text_image: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the ranks for recall@k. This is the registered op."""
    m, n = image.shape[0], text.shape[0]
    if text_image.device.type == "cpu":
        _check_indices("retrieval_ranks", text_image, m)
    else:
        text_image = text_image.where((text_image >= 0) & (text_image < m), -1)
    path = launches if triton_runs_on(image.device) else cpu
    image_ahead, text_ahead = path.ahead(image, text, text_image)
    # All others are ahead of an image without texts and of a text without image, and of no other.
    return image_ahead.masked_fill_(image_ahead == n, -1), text_ahead.masked_fill_(text_ahead == m, -1)


_retrieval_ranks.planned_by(lambda *_: _retrieval_ranks.run)  # Each call decides anew: the op is called rarely.


@_retrieval_ranks.register_fake
def _(image: Tensor, text: Tensor, text_image: Tensor) -> tuple[Tensor, Tensor]:
    return image.new_empty(image.shape[0], dtype=torch.int64), image.new_empty(text.shape[0], dtype=torch.int64)


def retrieval_ranks(
    image: Tensor, text: Tensor, *, text_image: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Compute the ranks of images and texts in each other's results, for recall@k, without the M x N scores.

    The score of a pair is the product of its features: the cosine, if they have unit length. The rank of a text is the
    number of images other than its own that score at least as high as its own; the rank of an image is the number of
    texts that are not its own and score at least as high as its best own one. 0 is a hit at rank 1. A tie counts
    against, so that a collapsed model, for which all scores are equal, gets no credit; equal features tie to the last
    bit. NaN counts against, too: as the score of another pair it is ahead, and as the score of an own pair the lowest.

    Autocast changes nothing. There is no gradient.

    Args:
        image: image features [M, D], float32, float16 or bfloat16 (float64 on the CPU); any strides.
        text: text features [N, D], same dtype and device as ``image``.
        text_image: int64 [N], the image that each text belongs to: an image may have several texts, or none. -1 means
            no image; such a text can only be ahead of others. Default: text i belongs to image i, and M is N.
        backend: "auto" (Triton on GPUs, blockwise PyTorch on CPUs), "triton", or "torch" for the full-matrix reference.

    Returns:
        Ranks of images [M] and of texts [N], int64; -1 for an image without texts and a text without an image.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together; on the CPU, an index that belongs to
            no image (on a GPU, where the check would have to wait, such an index counts as -1).
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op, options, free = "retrieval_ranks", (backend,), (1, 1, 1)  # Nothing depends on the numbers of images and texts.
    if text_image is not None:
        compute = _retrieval_ranks.find(options, (image, text, text_image), free)
        if compute is not None and text_image.shape == text.shape[:1]:
            return compute(image, text, text_image)
    check_tensor(op, "image", image, 2)
    check_tensor(op, "text", text, 2)
    check_like(op, "text", text, "image", image)
    if image.shape[1] != text.shape[1]:
        raise ValueError(
            f"{op}: image and text must have the same width, got {tuple(image.shape)} and {tuple(text.shape)}"
        )
    owner = _owner_tensor(op, text_image, image, text)
    if uses_reference(op, backend, image):
        if not torch.compiler.is_compiling():
            _check_indices(op, owner, len(image))
        return reference.retrieval_ranks(image.detach(), text.detach(), text_image=owner)
    check_float(op, image=image)
    tensors = image.detach(), text.detach(), owner
    return _retrieval_ranks.learn(options, tensors, tensors, free)(*tensors)


def _owner_tensor(op: str, text_image: Tensor | None, image: Tensor, text: Tensor) -> Tensor:
    """Return the image of each text for the op ``retrieval_ranks``, by default text i's image i; check the indices."""
    if text_image is None:
        if len(image) != len(text):
            raise ValueError(
                f"{op}: without text_image there must be as many texts as images, got {len(text)} and {len(image)}"
            )
        return torch.arange(len(text), device=text.device)
    check_integers(op, "text_image", text_image, (torch.int64,))
    if text_image.shape != text.shape[:1]:
        raise ValueError(f"{op}: text_image must be [{len(text)}], one per text, got {tuple(text_image.shape)}")
    check_device(op, "text_image", text_image, "image", image)
    return text_image
