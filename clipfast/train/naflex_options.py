"""The options of ``clipfast train`` for images in their own aspect (NaFlex), and their checks."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from .option_checks import flag_name, option

if TYPE_CHECKING:
    from .train_config import TrainConfig

SEQ_LENS = (128, 256, 576, 784, 1024)  # the default of --naflex-seq-lens, as in OpenCLIP
LOSS_SCALES = ("none", "linear", "sqrt")


@dataclasses.dataclass(frozen=True)
class NaFlexOptions:
    """The options of :class:`clipfast.train.TrainConfig` with which a NaFlex model trains on images of several sizes.

    All of these options but ``use_naflex`` itself need ``use_naflex``.
    """

    use_naflex: bool = option(
        False, "train a NaFlex model on images in their own aspect: each batch draws a number of patches that its "
        "images have at most, and has as many pairs as --naflex-max-tokens-per-batch allows; without it, the model "
        "trains on images of one size", bool,
    )  # fmt: skip
    naflex_seq_lens: tuple[int, ...] = option(
        (), f"numbers of patches, of which each batch draws one (default: {' '.join(map(str, SEQ_LENS))}); evaluation "
        "takes the largest one that is given, or the model's own number", int, positive=True,
    )  # fmt: skip
    naflex_seq_len_probs: tuple[float, ...] = option(
        (), "weight of each of --naflex-seq-lens in the draw (default: all alike)", float, not_negative=True
    )
    naflex_patch_sizes: tuple[int, ...] = option(
        (), "sides of a patch, of which each batch draws one; evaluation takes the first (default: the model's own)",
        int, positive=True,
    )  # fmt: skip
    naflex_patch_size_probs: tuple[float, ...] = option(
        (), "weight of each of --naflex-patch-sizes in the draw (default: all alike)", float, not_negative=True
    )
    naflex_max_tokens_per_batch: int = option(
        16384, "most patches of a batch of each process, if all of its images have the number that was drawn",
        int, positive=True,
    )  # fmt: skip
    naflex_batch_divisor: int = option(
        8, "the pairs of a batch of each process are a multiple of this, where so many fit", int, positive=True
    )
    naflex_num_train_image_tokens: int | None = option(
        None, "length of an epoch in patches, each image counted with the number that its batch drew, in place of "
        "--train-num-samples", int, positive=True, most=10**18,
    )  # fmt: skip
    naflex_loss_scale: str = option(
        "none", "multiply the gradients of a batch by the pairs of a process over --batch-size (linear), or by the "
        "root of that (sqrt)", choices=LOSS_SCALES,
    )  # fmt: skip


def check_naflex(config: "TrainConfig") -> None:
    """Check that the training options work with ``--use-naflex`` if it is given, and do not need it otherwise.

    Raises:
        ValueError: an option does not work with ``--use-naflex``, or needs it; the message says what to change.
    """
    if not config.use_naflex:
        fields = dataclasses.fields(NaFlexOptions)
        given = [flag_name(field.name) for field in fields if getattr(config, field.name) != field.default]
        if given:
            raise ValueError(f"{', '.join(given)} without --use-naflex: give --use-naflex too, or leave it out")
        return
    for name in ("naflex_seq_len", "naflex_patch_size"):
        _check_draw(config, f"{name}s", f"{name}_probs")
    longest = max(config.naflex_seq_lens or SEQ_LENS)
    if longest > config.naflex_max_tokens_per_batch:
        raise ValueError(
            f"--naflex-max-tokens-per-batch {config.naflex_max_tokens_per_batch} is less than one image of {longest} "
            "patches: raise it, or give smaller --naflex-seq-lens"
        )
    if config.train_num_samples is not None and config.naflex_num_train_image_tokens is not None:
        raise ValueError(
            f"--train-num-samples {config.train_num_samples} and --naflex-num-train-image-tokens "
            f"{config.naflex_num_train_image_tokens} both say how long an epoch is: leave one out"
        )
    refused = {
        "--cuda-graphs": (config.cuda_graphs, "hardly two batches have equally many patches"),
        "--decode-on-device": (config.decode_on_device, "it resizes images to one size"),
        "--force-image-size": (config.force_image_size, "--naflex-seq-lens limits the size of images"),
        "--image-resize-mode": (config.image_resize_mode, "images keep their aspect"),
    }
    for flag, (is_set, reason) in refused.items():
        if is_set:
            raise ValueError(f"{flag} does not work with --use-naflex, since {reason}: leave one of them out")
    if config.global_batch_size is not None:
        raise ValueError(
            f"--global-batch-size {config.global_batch_size} with --use-naflex: the pairs of a batch follow from "
            "--naflex-max-tokens-per-batch, which is for each process"
        )


def _check_draw(config: "TrainConfig", choices: str, probs: str) -> None:
    """Raise ValueError if the option ``choices`` repeats a number, or if ``probs`` does not give each a weight.

    Each training batch draws one of the numbers by these weights.
    """
    values, weights = getattr(config, choices), getattr(config, probs)
    if len(set(values)) < len(values):
        raise ValueError(f"{flag_name(choices)} names a number twice: {' '.join(map(str, values))}")
    if weights and len(weights) != len(values or (SEQ_LENS if choices == "naflex_seq_lens" else ())):
        given = f"{len(values)} of {flag_name(choices)}" if values else f"no {flag_name(choices)}"
        raise ValueError(f"{flag_name(probs)} needs a weight for each number, got {len(weights)} for {given}")
    if weights and not sum(weights) > 0:
        raise ValueError(f"{flag_name(probs)} must not all be 0")


def loss_scale(kind: str, batch_size: float) -> Callable[[int], float] | None:
    """Return a function from the pairs of a process to the factor of ``--naflex-loss-scale``; None for "none"."""
    if kind == "none":
        return None
    return lambda pairs: pairs / batch_size if kind == "linear" else math.sqrt(pairs / batch_size)
