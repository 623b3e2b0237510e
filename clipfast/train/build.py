"""Build the model of a training run, its loss, teacher and tokenizer, and choose its device, as the options say."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from ..checkpoints.preprocessing import complete_preprocessing
from ..data import check_decoder
from ..distributed.world import ALONE, World
from ..factory import create_model, set_precision, set_preprocessing
from ..kernels import contrastive_loss, distributed_contrastive_loss, sigmoid_loss
from ..kernels.fp8.support import check_fp8
from ..losses.accumulation import micro_batches
from ..losses.distill_loss import DistillClipLoss
from ..losses.siglip_loss import SigLipLoss
from ..models import CLIP, CLIPConfig, SigLIPConfig, build
from ..models.file_tokenizer import FileTokenizer, tokenizer_of
from ..models.naflex import NaFlexVision
from ..models.registry import registered
from ..models.tokenizer import Tokenizer
from .fsdp import is_sharded, shard
from .step import Images, Texts
from .train_config import TrainConfig


def build_device(config: TrainConfig, world: World = ALONE) -> torch.device:
    """Return the device that this process trains on.

    Raises:
        ValueError: an option does not work on that device, or in several processes.
    """
    device = world.device(config.device, by_rank=config.set_device_rank)
    if config.cuda_graphs and device.type != "cuda":
        raise ValueError(f"--cuda-graphs needs a GPU, and this run is on {device}")
    if config.cuda_graphs and world.size > 1:
        raise ValueError(f"--cuda-graphs works in one process, and there are {world.size}: leave it out")
    if config.use_bn_sync and world.size > 1 and device.type != "cuda":
        raise ValueError(f"--use-bn-sync needs GPUs, as PyTorch's SyncBatchNorm does, and this run is on {device}")
    if config.decode_on_device:
        check_decoder(device)
    if config.precision == "amp_fp8":
        check_fp8("--precision amp_fp8", device)
    return device


def uses_autocast(config: TrainConfig, device: torch.device) -> bool:
    """Return True if a training run uses autocast; with "auto" and "amp_fp8", it does on a GPU, but not on a CPU."""
    return device.type == "cuda" if config.precision in ("auto", "amp_fp8") else config.precision.startswith("amp")


def build_model(config: TrainConfig, saved: dict[str, Any], device: torch.device, world: World = ALONE) -> CLIP:
    """Build the model of a run on ``device``, in training mode, and compile it if ``--torchcompile`` is given.

    With FSDP2, the blocks are compiled when they are sharded. ``saved`` is the entry ``clipfast`` of the checkpoint
    that the run continues, if there is one. Its model configuration replaces ``config.model``. The weights of the
    checkpoint are loaded later.

    Raises:
        ValueError: the model is unknown, or its configuration or weights cannot be used.
    """
    model = bare_model(config, saved, device)
    if config.precision == "amp_fp8":
        model.set_fp8(config.fp8_recipe, config.fp8_skip)
    selective = config.selective_checkpointing
    model.set_grad_checkpointing(config.grad_checkpointing or selective, selective=selective)
    if config.torchcompile and not is_sharded(config, world):
        # PyTorch compiles the model for each patch size, and again for the passes of micro-batches without gradients.
        torch._dynamo.config.recompile_limit += 2 * len(config.naflex_patch_sizes)
        model.compile(fullgraph=True, backend=config.torchcompile_backend, mode=config.torchcompile_mode)
    return model


def bare_model(config: TrainConfig, saved: dict[str, Any], device: torch.device) -> CLIP:
    """Build the model of a training run, with its locked towers, but without torch.compile and checkpointing.

    On the device "meta", the model takes no memory, and weights are neither downloaded nor read.
    """
    precision = config.precision if config.precision in ("bf16", "pure_bf16") else "fp32"
    forced = _forced_preprocessing(config)
    if "model_config" in saved:
        model_config = CLIPConfig.from_dict(saved["model_config"])
        with device:
            model = build(model_config.with_vision(patch_dropout=config.force_patch_dropout))
        if "preprocess_cfg" in saved:
            set_preprocessing(model, complete_preprocessing(saved["preprocess_cfg"] | forced))
        model.set_backend(config.backend)
        set_precision(model, precision)
    else:
        name, size = registered(config.model), config.force_image_size or None
        model = create_model(
            name, config.pretrained, precision=precision, device=device, cache_dir=config.cache_dir,
            force_quick_gelu=config.force_quick_gelu, force_patch_dropout=config.force_patch_dropout,
            force_image_size=size, force_context_length=config.force_context_length,
            force_preprocess_cfg=forced, backend=config.backend, load_weights=device.type != "meta",
        )  # fmt: skip
    if config.use_naflex:
        _set_seq_len(config, model)
    _lock(config, model)
    if not config.pack_text:
        model.pack_text = False
    return model


def _set_seq_len(config: TrainConfig, model: CLIP) -> None:
    """Set the number of patches with which a NaFlex model is evaluated to the longest of ``--naflex-seq-lens``.

    Raises:
        ValueError: the model is no NaFlex model.
    """
    visual: nn.Module = model.visual
    if not isinstance(visual, NaFlexVision):
        raise ValueError(
            f"--use-naflex needs a NaFlex model, such as naflex_ViT-B-16, and {config.model} takes images of one size"
        )
    if config.naflex_seq_lens:
        visual.image_seq_len = max(config.naflex_seq_lens)
        model.config = model.config.with_vision(image_seq_len=visual.image_seq_len)


def _forced_preprocessing(config: TrainConfig) -> dict[str, Any]:
    """Return preprocessing arguments from --image-mean, --image-std, --image-interpolation and --image-resize-mode."""
    given = {
        "mean": config.image_mean, "std": config.image_std, "interpolation": config.image_interpolation,
        "resize_mode": config.image_resize_mode,
    }  # fmt: skip
    return {key: value * 3 if len(value) == 1 else value for key, value in given.items() if value}


def _lock(config: TrainConfig, model: CLIP) -> None:
    """Freeze the parts of the towers that ``--lock-image`` and ``--lock-text`` exclude from training."""
    if config.lock_image:
        model.lock_image_tower(config.lock_image_unlocked_groups, config.lock_image_freeze_bn_stats)
    if config.lock_text:
        model.lock_text_tower(config.lock_text_unlocked_layers)


def build_parallel(config: TrainConfig, model: CLIP, world: World, device: torch.device) -> nn.Module:
    """Wrap the trained model in DistributedDataParallel, or shard it by FSDP2, to average gradients over all ranks."""
    if world.size == 1:
        return model
    if is_sharded(config, world):
        shard(config, model, init_device_mesh(device.type, (world.size,)))
        return model
    if config.use_bn_sync:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, static_graph=config.ddp_static_graph,
        gradient_as_bucket_view=True,
    )  # fmt: skip


def build_loss(config: TrainConfig, model: CLIP, world: World = ALONE) -> Callable[..., Tensor]:
    """Build the training loss on a model's outputs: the sigmoid loss for SigLIP, the contrastive loss for CLIP.

    With several ranks, the mean of the ranks' losses is the loss of the whole batch, and the mean of their gradients is
    its gradient. The losses for several ranks have one implementation per kind of device, whatever ``--backend`` is.

    Raises:
        ValueError: ``--siglip`` or ``--no-siglip`` asks for the loss that does not fit the model.
    """
    is_siglip = isinstance(model.config, SigLIPConfig)
    if config.siglip is not None and config.siglip != is_siglip:
        raise ValueError(
            f"--no-siglip: {config.model} is a SigLIP model, which is trained with the sigmoid loss: leave the flag out"
            if is_siglip
            else f"--siglip: {config.model} is a CLIP model, which has no logit_bias: take a model with SigLIP in its "
            "name, or leave the flag out"
        )
    if world.size == 1:
        return functools.partial(sigmoid_loss if is_siglip else contrastive_loss, backend=config.backend)
    if is_siglip:
        return SigLipLoss(rank=world.rank, world_size=world.size)
    return functools.partial(_of_equal_parts, world.size)


def _of_equal_parts(ranks: int, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the distributed contrastive loss of this rank's pairs; as all ranks have equally many, sizes are known."""
    return distributed_contrastive_loss(image, text, logit_scale, sizes=[len(image)] * ranks)


def build_tokenizer(config: TrainConfig, model: CLIP) -> Tokenizer | FileTokenizer:
    """Build the tokenizer of a training run. SigLIP's is read from the file that ``--tokenizer`` names.

    Raises:
        ValueError: the file is missing, wrong, or not needed.
        ImportError: the tokenizers package is missing, for SigLIP.
    """
    if isinstance(model.config, SigLIPConfig):
        return tokenizer_of(model.config, config.model, config.tokenizer, None)
    if config.tokenizer is not None:
        raise ValueError(f"--tokenizer: {config.model} has CLIP's tokenizer, which needs no file: leave it out")
    tokenizer = Tokenizer(model.context_length)
    if tokenizer.vocab_size > model.config.text.vocab_size:
        raise ValueError(
            f"CLIP's tokenizer has {tokenizer.vocab_size} tokens, and {config.model} knows only "
            f"{model.config.text.vocab_size}: set vocab_size of its text_cfg to {tokenizer.vocab_size}"
        )
    return tokenizer


class Distillation:
    """The contrastive loss plus the cross-entropy of the logits against a teacher's logits, as OpenCLIP adds them.

    The teacher sees the images and texts that the student sees, without dropped patches.

    Args:
        config: options of the run.
        student: the model that is trained.
        device: device of student and teacher; on "meta" the teacher's weights are not read.
        world: the processes.
        autocast: returns the autocast context of the teacher's forward pass.

    Raises:
        ValueError: there is no such teacher, or its inputs are not the student's.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: CLIP,
        device: torch.device,
        world: World = ALONE,
        autocast: Callable[[], torch.autocast] | None = None,
    ) -> None:
        if config.distill_model is None:
            raise ValueError("distillation needs --distill-model: the name of the teacher")
        self.teacher = create_model(
            registered(config.distill_model), config.distill_pretrained, device=device, backend=config.backend,
            cache_dir=config.cache_dir, load_weights=device.type != "meta", force_patch_dropout=None,
        ).eval().requires_grad_(False)  # fmt: skip
        self.teacher.pack_text = config.pack_text  # a teacher is a CLIP model, whose text tower can pack texts
        inputs = [
            ("texts of", student.context_length, self.teacher.context_length),
            ("a vocabulary of", student.config.text.vocab_size, self.teacher.config.text.vocab_size),
        ]
        if not config.use_naflex:
            inputs.insert(0, ("images of", student.visual.image_size, self.teacher.visual.image_size))
        elif not isinstance(self.teacher.visual, NaFlexVision):
            raise ValueError(f"--use-naflex needs a NaFlex model as --distill-model, not {config.distill_model}")
        for what, mine, theirs in inputs:
            if mine != theirs:
                raise ValueError(
                    f"--distill-model {config.distill_model} has {what} {theirs}, and {config.model} of {mine}: a "
                    "teacher must take the inputs of its student"
                )
        if SigLIPConfig in map(type, (student.config, self.teacher.config)):
            raise ValueError("--distill-model works with CLIP's loss only, not with SigLIP models")
        self._autocast = autocast
        self._loss = DistillClipLoss(
            local_loss=True, gather_with_grad=True, rank=world.rank, world_size=world.size
        )  # with these flags, the gradients averaged over the ranks are those of the whole batch
        self._targets: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def look(self, images: Images, texts: Texts, size: int) -> None:
        """Compute the teacher's features of the batch of the next training step, ``size`` pairs at a time."""
        assert self._autocast is not None
        with self._autocast():
            parts = [self.teacher(*part)[:2] for part in micro_batches(images, texts, size)]
        image_features, text_features = (torch.cat(side) for side in zip(*parts, strict=True))
        self._targets = image_features, text_features, self.teacher.logit_scale.exp()

    def __call__(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        """Return the distillation loss of the student's features of the batch that :meth:`look` was given last."""
        assert self._targets is not None
        contrastive, distill = self._loss(image_features, text_features, logit_scale, *self._targets)
        return contrastive + distill
