"""The settings by which images are prepared: what checkpoints state of them, and the defaults of CLIP and SigLIP."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..kernels.reference import CLIP_MEAN, CLIP_STD
from ..models import CLIP
from ..models.images import INTERPOLATIONS, RESIZE_MODES
from ..models.siglip import IMAGE_MEAN, IMAGE_STD
from .checkpoint import CheckpointError, is_siglip_state, own_entry, plain_names

# The default preprocessing settings of CLIP (False) and of SigLIP (True), by OpenCLIP's names.
_PREPROCESSING: dict[bool, dict[str, Any]] = {
    False: {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    True: {"mean": IMAGE_MEAN, "std": IMAGE_STD, "interpolation": "bicubic", "resize_mode": "squash"},
}
PREPROCESSING_KEYS = tuple(_PREPROCESSING[False])


def stated_preprocessing(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing settings that a clipfast checkpoint states; {} for checkpoints of other packages."""
    found = own_entry(checkpoint).get("preprocess_cfg")
    return found if isinstance(found, dict) else {}


def own_preprocessing(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's preprocessing settings, with defaults of CLIP or SigLIP for those it does not state."""
    is_siglip = is_siglip_state(plain_names(checkpoint["state_dict"]))
    return complete_preprocessing(stated_preprocessing(checkpoint), is_siglip=is_siglip)


def preprocessing_of(model: CLIP) -> dict[str, Any]:
    """Return the preprocessing settings that a checkpoint of the model states, by OpenCLIP's names."""
    visual: Any = model.visual
    given = {"mean": list(visual.image_mean), "std": list(visual.image_std), "resize_mode": visual.resize_mode}
    return complete_preprocessing(given | {"interpolation": getattr(visual, "preprocess_cfg", {}).get("interpolation")})


def complete_preprocessing(given: Mapping[str, Any], *, is_siglip: bool = False) -> dict[str, Any]:
    """Return preprocessing settings with the defaults of CLIP or SigLIP for the settings that ``given`` lacks.

    Raises:
        CheckpointError: mean or std is not three numbers.
    """
    usual = {key: list(x) if isinstance(x, tuple) else x for key, x in _PREPROCESSING[is_siglip].items()}
    complete = usual | {key: value for key, value in given.items() if value is not None}
    for key in ("mean", "std"):
        value = complete[key]
        is_three = isinstance(value, list | tuple) and len(value) == 3
        # the comparison is False for NaN
        is_right = is_three and all(isinstance(x, int | float) and abs(x) < 1e6 for x in value)
        if not is_right or (key == "std" and min(value) <= 0):
            kind = "positive numbers" if key == "std" else "numbers"
            raise CheckpointError(f"the {key} of images must be three {kind}, got {value!r:.80}")
    return complete


def check_preprocessing(preprocessing: Mapping[str, Any], source: str | Path) -> None:
    """Refuse preprocessing settings that clipfast does not implement.

    Raises:
        CheckpointError: as above.
    """
    for key, known in (("interpolation", INTERPOLATIONS), ("resize_mode", RESIZE_MODES), ("fill_color", (0,))):
        value = preprocessing.get(key, known[0])
        if value not in known:
            ours = " or ".join(map(repr, known))
            raise CheckpointError(f"{source} preprocesses images with {key} {value!r}, clipfast only with {ours}")
