"""The options of ``clipfast train``, in one table that defines the flags, the keys of recipes and the checks."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from .data_options import DataOptions
from .fsdp_options import check_fsdp
from .naflex_options import NaFlexOptions, check_naflex
from .option_checks import check_type, check_value, flag_name, keys_of, option, separator_of

if TYPE_CHECKING:  # these modules load PyTorch, which --help must not do, so they are imported for annotations only
    from ..data import Keys

PRECISIONS = ("auto", "fp32", "amp", "amp_bf16", "amp_bfloat16", "amp_fp8", "bf16", "pure_bf16")
AUGMENTATIONS = ("affine", "color_jitter", "hue", "gray_prob")
# Options that exclude each other: if the command line gives one (key), a recipe's or checkpoint's value of the other
# (value) is dropped.
REPLACED = {
    "epochs": "samples_seen", "samples_seen": "epochs", "batch_size": "global_batch_size",
    "train_num_samples": "naflex_num_train_image_tokens", "naflex_num_train_image_tokens": "train_num_samples",
}  # fmt: skip
SHARE = {"not_negative": True, "most": 1}
BELOW_1 = {"not_negative": True, "below": 1}
SCHEDULERS = ("cosine", "const", "const-cooldown", "wsd")
COOLDOWN_OPTIONS = {  # each option of the cool-down, with the values of --lr-scheduler that use it
    "epochs_cooldown": ("const-cooldown",), "decay_fraction": ("wsd",),
    "lr_cooldown_end": ("const-cooldown", "wsd"), "lr_cooldown_power": ("const-cooldown", "wsd"),
}  # fmt: skip
FP8_OPTIONS = ("fp8_recipe", "fp8_skip")  # options that need --precision amp_fp8
LOCKED_PARTS = ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats", "lock_text_unlocked_layers")


@dataclasses.dataclass(frozen=True)
class TrainConfig(NaFlexOptions, DataOptions):
    """Options of a training run. Names follow OpenCLIP's flags; the help text of each is its documentation."""

    model: str = option("ViT-B-32", "model name, as clipfast.list_models() gives it, or path of an OpenCLIP model JSON")
    pretrained: str | None = option(None, "tag (clipfast list-pretrained) or checkpoint that the weights start from")
    cache_dir: str | None = option(None, "folder of the weights that are downloaded (default: huggingface_hub's own)")
    force_quick_gelu: bool = option(False, "use QuickGELU even if the model's name does not say so", bool)
    force_image_size: tuple[int, ...] = option(
        (), "side of the images, in place of the model's own", int, positive=True
    )
    force_context_length: int | None = option(None, "tokens of a text, in place of the model's own", int, positive=True)
    image_mean: tuple[float, ...] = option((), "mean of each channel, in place of the model's own", float)
    image_std: tuple[float, ...] = option((), "deviation of each channel, in place of the model's own", float)
    image_interpolation: str | None = option(
        None, "how images are resized for evaluation, in place of the model's own way; random is bicubic",
        choices=("bicubic", "bilinear", "random"),
    )  # fmt: skip
    image_resize_mode: str | None = option(
        None, "which side is resized for evaluation, in place of the model's own way",
        choices=("shortest", "longest", "squash"),
    )  # fmt: skip
    tokenizer: str | None = option(None, "tokenizer.json of a SigLIP model, or the folder that holds it")
    siglip: bool | None = option(
        None, "train with the sigmoid loss; SigLIP models have no other loss, and CLIP models do not take it (default: "
        "the model's loss)", bool,
    )  # fmt: skip
    force_patch_dropout: float | None = option(
        None, "share of each image's patches to drop in training (FLIP), in place of the model's own", float, **BELOW_1
    )
    distill_model: str | None = option(
        None, "teacher, a model whose logits are learned too (its name or JSON); it must take the same inputs"
    )
    distill_pretrained: str | None = option(None, "weights of the teacher: a tag or a checkpoint")
    batch_size: int = option(
        256, "pairs per step of each process; with --use-naflex, only the divisor of --naflex-loss-scale, and the "
        "number of pairs in the loss of an evaluation", int, positive=True,
    )  # fmt: skip
    global_batch_size: int | None = option(
        None, "pairs per step of all processes together, in place of --batch-size (default: --batch-size times the "
        "number of processes)", int, positive=True,
    )  # fmt: skip
    micro_batch_size: int | str | None = option(
        None, "hold the activations of only so many pairs at a time, for one more forward pass; the gradient stays "
        "that of the whole batch, except that BatchNorm normalises each micro-batch by itself; auto takes the most "
        "that fits on the GPU; with --use-naflex, it is for the longest images, and shorter ones are as many patches "
        "at a time (default: the whole batch)", int, positive=True, auto=True,
    )  # fmt: skip
    epochs: int = option(32, "passes over the --train-num-samples pairs", int, positive=True)
    samples_seen: int | None = option(
        None,
        "pairs to train on, in place of --epochs: the run may end within an epoch",
        int,
        positive=True,
        most=10**15,
    )
    lr: float = option(5e-4, "peak learning rate", float, positive=True)
    lr_scheduler: str = option(
        "cosine", "course of the learning rate after the warm-up: half a cosine to zero, constant, constant with a "
        "cool-down over the last --epochs-cooldown, or (wsd) over the last --decay-fraction of the run",
        choices=SCHEDULERS,
    )  # fmt: skip
    skip_scheduler: bool = option(False, "keep the learning rate at --lr from the first step on", bool)
    epochs_cooldown: int | None = option(None, "length of the cool-down of const-cooldown", int, positive=True)
    decay_fraction: float = option(0.1, "length of the cool-down of wsd, as a share of the run", float, **SHARE)
    lr_cooldown_end: float = option(0.0, "learning rate at the end of a cool-down", float, not_negative=True)
    lr_cooldown_power: float = option(
        1.0, "power of the polynomial that a cool-down follows; 1 is a straight line", float, positive=True
    )
    wd: float = option(0.2, "weight decay of all but gains, biases and the logit scale", float, not_negative=True)
    wd_exclude: tuple[str, ...] = option(
        (), "more parameters without weight decay, as patterns of their names such as '*positional_embedding'"
    )
    opt: str = option(
        "adamw", "optimizer: a name of torch.optim, nadamw, stableadamw (AdamW with shorter steps after a jump of the "
        "gradient), muon (for the matrices of the blocks and the projections; AdamW for the rest), or the import path "
        "package.module:Class",
    )  # fmt: skip
    opt_kwargs: tuple[str, ...] = option((), "more arguments of the optimizer but lr and weight_decay, as name=value")
    momentum: float | None = option(None, "momentum of an optimizer that has one, such as sgd", float, **BELOW_1)
    image_layer_decay: float | None = option(
        None, "factor on the learning rate from each layer of the image tower to the one before it; the projection "
        "keeps --lr", float, positive=True, most=1, aliases=("--visual-layer-decay",),
    )  # fmt: skip
    text_layer_decay: float | None = option(
        None, "as --image-layer-decay, for the text tower", float, positive=True, most=1
    )
    beta1: float = option(0.9, "beta1 of AdamW", float, **BELOW_1)
    beta2: float | None = option(
        None, "beta2 of AdamW (default: 0.98 for vision transformers, 0.999 for others)", float, **BELOW_1
    )
    eps: float | None = option(
        None, "epsilon of AdamW (default: 1e-6 for vision transformers, 1e-8 for others)", float, positive=True
    )
    warmup: float | str = option(
        2000, "steps of a rising learning rate at the start; less than 1 is a share of the run, and auto is a tenth of "
        "it, at most 2000 steps", float, not_negative=True, auto=True,
    )  # fmt: skip
    grad_clip_norm: float | None = option(
        None, "clip the norm of the gradient to this (default: no clipping)", float, positive=True
    )
    ema_decay: float | None = option(
        None, "keep an exponential moving average of the weights with this decay, which is evaluated and exported in "
        "their place; over the first steps the decay rises to this value (default: no average)", float, **BELOW_1,
    )  # fmt: skip
    lock_image: bool = option(False, "do not train the image tower", bool)
    lock_image_unlocked_groups: int = option(
        0, "train so many parts of the locked image tower, counted from its output: the projection or attention "
        "pooling, then the blocks or stages", int, not_negative=True,
    )  # fmt: skip
    lock_image_freeze_bn_stats: bool = option(
        False, "keep the running statistics of BatchNorm in the locked parts of the image tower", bool
    )
    lock_text: bool = option(False, "do not train the text tower", bool)
    lock_text_unlocked_layers: int = option(
        0, "train so many parts of the locked text tower, counted from its output: the projection, then the blocks",
        int, not_negative=True,
    )  # fmt: skip
    lock_text_freeze_layer_norm: bool = option(
        False, "for OpenCLIP's commands, without effect: layer norms are always locked with their block", bool
    )
    precision: str = option(
        "auto", "auto is amp_bf16 on a GPU, else fp32; amp and amp_bfloat16 are amp_bf16 too; amp_fp8 is auto "
        "with the linear layers of the blocks in 8 bits, which a CPU emulates; bf16 is pure_bf16 with norms and "
        "embeddings in fp32", choices=PRECISIONS,
    )  # fmt: skip
    fp8_recipe: str = option(
        "switchback", "with amp_fp8: switchback computes the gradients of weights in 16 bits, full in 8 bits too",
        choices=("switchback", "full"),
    )  # fmt: skip
    fp8_skip: tuple[int, int] = option(
        (0, 1), "with amp_fp8: so many first and so many last blocks of each tower stay in 16 bits", int,
        not_negative=True,
    )  # fmt: skip
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass", bool)
    selective_checkpointing: bool = option(
        False, "recompute only norms and activation functions: this saves less memory, but takes hardly any time", bool
    )
    pack_text: bool = option(
        True, "compute no token behind the end of a text, which changes no feature and no gradient; models that read "
        "padding (SigLIP) compute all", bool,
    )  # fmt: skip
    torchcompile: bool = option(False, "compile the model with torch.compile, as one graph", bool)
    torchcompile_backend: str = option("inductor", "backend of torch.compile")
    torchcompile_mode: str | None = option(None, "mode of torch.compile, such as max-autotune (default: its own)")
    cuda_graphs: bool = option(
        False, "replay each step as one CUDA graph: faster for small models, which wait for the host otherwise; packed "
        "texts have a few numbers of tokens, of which at most eight get a graph; others run without one", bool,
    )  # fmt: skip
    device: str = option("auto", "cpu, cuda, or auto for a GPU if there is one")
    set_device_rank: bool = option(
        True, "give each process the GPU with its local rank; otherwise each takes the first GPU that it sees", bool
    )
    use_bn_sync: bool = option(False, "normalise by the statistics of all processes' images (SyncBatchNorm)", bool)
    ddp_static_graph: bool = option(
        False, "tell DistributedDataParallel that every step uses the same parameters in the same way", bool
    )
    fsdp: bool = option(
        False, "keep only a part of weights, gradients and optimizer state on each process (FSDP2), in place of a copy "
        "of all on each; of no effect in one process", bool,
    )  # fmt: skip
    fsdp_no_reshard_after_forward: bool = option(
        False, "keep the gathered weights of each block from its forward to its backward pass: less communication, "
        "more memory", bool,
    )  # fmt: skip
    fsdp_offload_cpu: bool = option(
        False, "keep the parts of the weights, of their gradients and of the optimizer's state in the host's memory, "
        "where the optimizer then runs", bool,
    )  # fmt: skip
    fsdp_checkpoint: str = option(
        "full", "full gathers each checkpoint into one file, step_N.pt; with sharded, every process writes its parts "
        "into a folder, step_N, and only epoch_N.pt and the last checkpoint are gathered", choices=("full", "sharded"),
    )  # fmt: skip
    dist_timeout: int = option(
        60, "seconds after which processes give up waiting for another one; before the first step they wait for at "
        "least ten minutes", int, positive=True,
    )  # fmt: skip
    backend: str = option("auto", "implementation of the ops", choices=("auto", "triton", "torch"))
    workers: int = option(1, "data worker processes", int, not_negative=True)
    seed: int = option(0, "seed of every random number generator", int, not_negative=True, most=2**62)
    unique_by: str | None = option(None, "json key, or 'caption', whose value no two pairs of a batch may share")
    keyword_prob: float = option(
        0.0, "probability of adding keywords from a pair's json to its caption", float, **SHARE
    )
    crop_scale: tuple[float, float] = option(
        (0.9, 1.0), "smallest and largest share of the area that a random crop keeps; 1 1 takes the centre", float
    )
    affine: float = option(
        0.0, "augmentation: rotate by up to 100 times this in degrees, shift by up to half of this share, and scale by "
        "up to this share", float, **SHARE,
    )  # fmt: skip
    color_jitter: float = option(
        0.0, "augmentation: change brightness, contrast and saturation by up to this share", float, not_negative=True
    )
    hue: float = option(
        0.0, "augmentation: turn the colour wheel by up to this share, at most 0.5", float, not_negative=True, most=0.5
    )
    gray_prob: float = option(0.0, "augmentation: probability that an image loses its colour", float, **SHARE)
    aug_cfg: tuple[str, ...] = option(
        (), "augmentations as OpenCLIP writes them, in place of the flags here: scale, ratio, color_jitter and "
        "color_jitter_prob, and gray_scale_prob, as name=value",
    )  # fmt: skip
    max_image_pixels: int = option(
        0, "leave out images of more pixels; with 0, of more than 89,478,485", int, not_negative=True
    )
    decode_on_device: bool = option(
        False, "decode JPEG files on the GPU (nvJPEG, by torchvision), so that data workers only read them and choose "
        "the crops; it works on a CPU too, and was not measured on a GPU yet", bool,
    )  # fmt: skip
    val_data: str | None = option(
        None, "labelled shards or image folder for zero-shot evaluation, or pairs for retrieval"
    )
    val_frequency: int = option(
        1, "evaluate on --val-data every so many epochs, and after the last one; with 0, never", int, not_negative=True
    )
    imagenet_val: str | None = option(
        None, "folder of ImageNet's validation images, one sub-folder per class, for zero-shot accuracy with OpenAI's "
        "prompts",
    )  # fmt: skip
    imagenet_v2: str | None = option(None, "folder of ImageNet-V2's images, as for --imagenet-val")
    zeroshot_frequency: int = option(
        2, "evaluate on ImageNet every so many epochs, and after the last one; with 0, never", int, not_negative=True
    )
    val_group_by: str | None = option(None, "key of the validation json; accuracy is also given for each of its values")
    val_leave_out: tuple[str, ...] = option((), "groups to leave out of a second overall accuracy")
    max_bad_fraction: float = option(
        0.01, "stop if more than this share of the pairs cannot be decoded", float, **SHARE
    )
    max_nonfinite_steps: int = option(
        10, "stop after so many steps in a row whose loss or gradient is infinite or NaN; such a step changes no "
        "weight, and nonfinite.jsonl in the run's folder lists the pairs of its batch", int, positive=True,
    )  # fmt: skip
    save_every: int = option(0, "save every so many steps; with 0, only after each epoch", int, not_negative=True)
    save_every_minutes: float = option(0.0, "save every so many minutes; with 0, never", float, not_negative=True)
    keep_last: int = option(2, "keep so many of the last checkpoints, step_N.pt or step_N", int, positive=True)
    remote_sync: str | None = option(
        None, "keep a copy of the run's folder under this URL (s3://, gs://, file:// or whatever else fsspec knows); "
        "--resume latest goes on from it if it has a newer checkpoint than --logs"
    )  # fmt: skip
    remote_sync_frequency: int = option(
        300, "least number of seconds between the starts of two uploads of --remote-sync", int, positive=True
    )
    save_frequency: int = option(
        1, "keep epoch_N.pt every so many epochs, and after the last one; with 0, never", int, not_negative=True
    )
    delete_previous_checkpoint: bool = option(False, "keep only the last epoch_N.pt", bool)
    log_every_n_steps: int = option(50, "steps between two log lines", int, positive=True)
    log_metric_every_n_steps: int | None = option(
        None, "steps between two lines of metrics.jsonl (default: --log-every-n-steps)", int, positive=True
    )
    report_to: str = option(
        "", "where else to report the run's metrics: wandb, or all; TensorBoard's files are always written, to "
        "tensorboard/ in the run's folder",
    )  # fmt: skip
    wandb_project_name: str = option("open-clip", "project in Weights & Biases")
    wandb_notes: str = option("", "notes on the run in Weights & Biases")
    name: str | None = option(None, "name of the run (default: the recipe or the model, and the time)")
    log_local: bool = option(False, "let one process of each machine write its log, to out-RANK", bool)
    logs: str = option("runs", "folder in which the run gets a folder of its own")

    def __post_init__(self) -> None:
        """Check every training option before anything is built.

        Raises:
            ValueError: an option cannot work; the message names the flag, its value, and values that would work.
        """
        for field in dataclasses.fields(self):
            check_type(field, getattr(self, field.name))
            check_value(field, getattr(self, field.name))
        if self.samples_seen is not None and self.epochs != type(self).epochs:
            raise ValueError(
                f"--samples-seen {self.samples_seen} and --epochs {self.epochs} both say how long the run is: leave "
                "one out"
            )
        if self.cuda_graphs and self.micro_batch_size is not None:
            raise ValueError("--cuda-graphs replays a whole batch: leave out --micro-batch-size, or --cuda-graphs")
        if self.ddp_static_graph and self.micro_batch_size is not None:
            raise ValueError(
                "--ddp-static-graph wants every backward pass to exchange gradients, and only that of the last "
                "micro-batch does: leave out one of --ddp-static-graph and --micro-batch-size"
            )
        if self.val_leave_out and self.val_group_by is None:
            raise ValueError("--val-leave-out needs --val-group-by: the key that says which group an image is in")
        for key in FP8_OPTIONS:
            if self.precision != "amp_fp8" and getattr(self, key) != getattr(type(self), key):
                raise ValueError(f"{flag_name(key)} needs --precision amp_fp8")
        if len(self.fp8_skip) != 2:
            raise ValueError(f"--fp8-skip needs two numbers of blocks, got {' '.join(map(str, self.fp8_skip))}")
        check_fsdp(self)
        check_naflex(self)
        self.keys()
        self.separator()
        if isinstance(self.warmup, float) and self.warmup >= 1 and not self.warmup.is_integer():
            raise ValueError(f"--warmup must be a number of steps, or a share of the run below 1, got {self.warmup}")
        for key, schedulers in COOLDOWN_OPTIONS.items():
            if self.lr_scheduler not in schedulers and getattr(self, key) != getattr(type(self), key):
                raise ValueError(
                    f"{flag_name(key)} needs --lr-scheduler {' or '.join(schedulers)}, and it is {self.lr_scheduler}"
                )
        if self.lr_scheduler == "const-cooldown" and self.epochs_cooldown is None:
            raise ValueError("--lr-scheduler const-cooldown needs --epochs-cooldown: the length of the cool-down")
        for key in ("opt_kwargs", "aug_cfg"):
            wrong = [
                word for word in getattr(self, key) if not word.partition("=")[0].isidentifier() or "=" not in word
            ]
            if wrong:
                raise ValueError(f"{flag_name(key)} must be name=value, got {wrong[0]!r}")
        for argument, flag in (("lr", "--lr"), ("weight_decay", "--wd")):
            if any(word.partition("=")[0] == argument for word in self.opt_kwargs):
                raise ValueError(f"--opt-kwargs must not set {argument}: use {flag}")
        for part in LOCKED_PARTS:
            tower = "_".join(part.split("_")[:2])
            if getattr(self, part) and not getattr(self, tower):
                raise ValueError(f"{flag_name(part)} needs {flag_name(tower)}")
        if (self.distill_model is None) != (self.distill_pretrained is None):
            raise ValueError("--distill-model and --distill-pretrained go together: a teacher, and its weights")
        if self.distill_model is not None and self.cuda_graphs:
            raise ValueError("--distill-model cannot be used with --cuda-graphs, which replay one model")
        if not self.train_data:
            raise ValueError("--train-data is needed: shards such as 'data/{000..099}.tar', or use --recipe emoji")
        if self.name is not None and (Path(self.name).name != self.name or self.name == ".."):
            raise ValueError(f"--name must be the name of a folder in --logs, not a path, got {self.name!r}")
        if self.logs.lower() == "none":
            raise ValueError("--logs none: a run needs a folder for its checkpoints: give one")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"--crop-scale needs two shares of the area, 0 < low <= high <= 1, got {low} {high}")
        augmentations = ", ".join(flag_name(key) for key in AUGMENTATIONS if getattr(self, key))
        if self.aug_cfg and (augmentations or self.crop_scale != type(self).crop_scale):
            raise ValueError(f"--aug-cfg takes the place of {augmentations or '--crop-scale'}: leave one of them out")
        augmentations += "--aug-cfg" if self.aug_cfg else ""
        if self.decode_on_device and augmentations:
            raise ValueError(f"--decode-on-device cannot be used with {augmentations}, which data workers apply")
        if self.decode_on_device and self.crop_scale == (1.0, 1.0):
            raise ValueError("--decode-on-device cannot be used with --crop-scale 1 1: it takes random crops")
        least = 1 if self.use_naflex else self.global_batch_size or self.batch_size
        if self.train_num_samples is not None and self.train_num_samples < least:
            raise ValueError(f"--train-num-samples {self.train_num_samples} is less than one batch of {least}")

    def keys(self) -> "Keys":
        """Return the keys under which a training pair has its image and its captions."""
        return keys_of(vars(self))

    def separator(self) -> str | None:
        """Return the separator of CSV files of training pairs, or None if the header of each file decides."""
        return separator_of(vars(self))
