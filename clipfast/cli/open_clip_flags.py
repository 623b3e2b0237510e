"""The flags of OpenCLIP's training command, and how ``clipfast train`` treats each of them.

The table ``FLAGS`` is the source of the parser, of ``docs/openclip-flags.md``, which
``python -m clipfast.cli.open_clip_flags`` prints, and of tests. It follows ``params.py`` of OpenCLIP's main branch at
commit 89fb801. The last four flags of the table are of version 4.2.1, which names them in files beside ``params.py``.
"""

import argparse
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, NoReturn

from ..train.train_config import TrainConfig
from .arguments import COUNT

GROUP = "for commands of OpenCLIP"


class Rule(NamedTuple):
    """How ``clipfast train`` treats a flag of OpenCLIP.

    Attributes:
        how: "same": an option of this name has the same meaning. "mapped": it is translated to other options.
            "accepted": it is ignored, since clipfast always behaves in this way, or since it does not affect the
            computation. "refused": it is an error.
        note: by ``how``: the difference from OpenCLIP, the translation, why it is ignored, or what to use instead.
        takes: arguments of ``add_argument`` for a flag that is not an option of clipfast.
    """

    how: Literal["same", "mapped", "accepted", "refused"]
    note: str = ""
    takes: Mapping[str, Any] = {}


SWITCH = {"nargs": 0}  # argparse arguments of a flag that takes no value
NO_AUDIO = Rule("refused", "clipfast trains on images and texts only: use OpenCLIP for audio")
NO_COCA = Rule(
    "refused", "clipfast trains no captioner: use OpenCLIP for CoCa and MaMMUT (their loss is clipfast.CoCaLoss)"
)  # fmt: skip
NO_BUCKETS = Rule(
    "refused", "it would change which pairs are in a batch, and the padding of texts is not computed: leave it out"
)  # fmt: skip
SAME = Rule("same")


def _local_url(text: str) -> str:
    """Return the value of OpenCLIP's ``--dist-url``; raise an error unless it is "env://"."""
    if text != "env://":
        raise argparse.ArgumentTypeError(
            f"{text!r}: start by torchrun, and give the address to its --rdzv-endpoint; only env:// is accepted"
        )
    return text


FLAGS: dict[str, Rule] = {
    "--train-data": SAME,
    "--train-data-upsampling-factors": Rule(
        "same", "if all are below 1, they are divided by the largest: an epoch sees its pairs once"
    ),
    "--val-data": Rule("same", "retrieval, clip_val_loss, and accuracy with each caption as a class"),
    "--train-num-samples": Rule("same", "not needed: pairs are counted"),
    "--val-num-samples": Rule("accepted", "pairs are counted, and all of them are evaluated", {"type": COUNT}),
    "--dataset-type": Rule(
        "mapped", "names say the type of data; synthetic is --train-data synthetic:N, with N of --train-num-samples",
        {"choices": ("webdataset", "csv", "synthetic", "auto")},
    ),
    "--audio-ext": NO_AUDIO,
    "--pretrained-audio": NO_AUDIO,
    "--audio-fill": NO_AUDIO,
    "--audio-trunc": NO_AUDIO,
    "--audio-fusion": NO_AUDIO,
    "--audio-int16-normalize": NO_AUDIO,
    "--audio-zeroshot-dataset": NO_AUDIO,
    "--audio-zeroshot-split": NO_AUDIO,
    "--audio-zeroshot-audio-key": NO_AUDIO,
    "--audio-zeroshot-target-key": NO_AUDIO,
    "--audio-zeroshot-class-key": NO_AUDIO,
    "--audio-zeroshot-template": NO_AUDIO,
    "--audio-zeroshot-workers": NO_AUDIO,
    "--audio-zeroshot-multiprocessing-context": NO_AUDIO,
    "--audio-multiprocessing-context": NO_AUDIO,
    "--dataset-resampled": SAME,
    "--csv-separator": Rule("same", "without it, or where a header lacks it, extension and header decide"),
    "--csv-img-key": Rule("same", "another name of --image-key"),
    "--csv-caption-key": Rule("same", "another name of --text-key"),
    "--image-key": SAME,
    "--max-image-pixels": Rule("same", "0 does not go beyond the 89,478,485 that are safe to decode"),
    "--text-key": SAME,
    "--json-text-key": SAME,
    "--json-text-key-probs": SAME,
    "--imagenet-val": SAME,
    "--imagenet-v2": Rule("same", "a folder that is there already: nothing is downloaded"),
    "--cache-dir": SAME,
    "--logs": Rule("same", "a run always has a folder: 'none' is refused"),
    "--log-local": SAME,
    "--name": Rule("same", "the name of a run that has none is made of the model and the time"),
    "--workers": SAME,
    "--batch-size": Rule("same", "with --use-naflex, only --naflex-loss-scale and the loss of an evaluation read it"),
    "--epochs": SAME,
    "--epochs-cooldown": SAME,
    "--lr": SAME,
    "--beta1": SAME,
    "--beta2": SAME,
    "--eps": SAME,
    "--wd": SAME,
    "--momentum": SAME,
    "--warmup": SAME,
    "--opt": Rule("same", "also optimizers of torch.optim, and import paths"),
    "--opt-kwargs": SAME,
    "--opt-fallback-list": Rule(
        "refused", "which parameters an optimizer takes is its own matter: --opt muon takes the matrices of the blocks "
        "and the projections, and AdamW the rest",
    ),
    "--text-layer-decay": SAME,
    "--image-layer-decay": SAME,
    "--audio-layer-decay": NO_AUDIO,
    "--wd-exclude": Rule("same", "positions have weight decay unless it names them"),
    "--text-pooler-own-group": Rule("refused", "clipfast's text towers have no pooler: leave it out"),
    "--use-bn-sync": SAME,
    "--skip-scheduler": SAME,
    "--lr-scheduler": SAME,
    "--lr-cooldown-end": SAME,
    "--lr-cooldown-power": SAME,
    "--save-frequency": Rule("same", "with 0, the last epoch is in epoch_latest.pt only"),
    "--save-most-recent": Rule("accepted", "epoch_latest.pt is always written", SWITCH),
    "--zeroshot-frequency": SAME,
    "--val-frequency": SAME,
    "--val-retrieval-chunk-size": Rule(
        "accepted", "ranks are exact, and the matrix of scores is never held as a whole", {"type": COUNT}
    ),
    "--val-retrieval-precision": Rule(
        "accepted", "it is always fp32: scores are summed in float32, of features as the model gives them",
        {"choices": ("fp32", "model")},
    ),
    "--resume": Rule("same", "a run goes on at its step, with its data and random state; folders are taken too"),
    "--precision": Rule(
        "same", "amp, which is float16 there, is amp_bf16; fp16 and pure_fp16 are refused: use amp_bf16"
    ),
    "--model": SAME,
    "--pretrained": SAME,
    "--pretrained-image": Rule("refused", "clipfast loads no weights of one tower: use --pretrained"),
    "--lock-image": SAME,
    "--lock-image-unlocked-groups": SAME,
    "--lock-image-freeze-bn-stats": SAME,
    "--image-mean": SAME,
    "--image-std": SAME,
    "--image-interpolation": SAME,
    "--image-resize-mode": SAME,
    "--aug-cfg": Rule(
        "same", "without what timm does there (use_timm, re_prob, re_count), which is refused; with --use-naflex, "
        "naflex=True changes nothing, and use_timm=True gives all images timm's color_jitter",
    ),
    "--grad-checkpointing": SAME,
    "--local-loss": Rule("accepted", "the loss never holds more than a rank's part of the matrix", SWITCH),
    "--gather-with-grad": Rule("accepted", "gradients always are those of the whole batch", SWITCH),
    "--force-context-length": SAME,
    "--force-image-size": SAME,
    "--force-quick-gelu": SAME,
    "--force-patch-dropout": SAME,
    "--force-custom-text": Rule(
        "accepted", "it only names the weights in another way, and OpenCLIP reads both ways", SWITCH
    ),
    "--torchcompile": SAME,
    "--torchcompile-strategy": Rule(
        "accepted", "only the model is compiled: the loss and the optimizer are kernels of their own",
        {"choices": ("model", "task", "step")},
    ),
    "--torchcompile-backend": SAME,
    "--torchcompile-mode": SAME,
    "--accum-freq": Rule(
        "mapped", "--accum-freq K with --batch-size B is --batch-size K*B with --micro-batch-size B", {"type": COUNT}
    ),
    "--device": SAME,
    "--dist-url": Rule("accepted", "env:// is what torchrun and Slurm set", {"type": _local_url}),
    "--dist-backend": Rule("accepted", "NCCL on GPUs, gloo on CPUs", {"choices": ("nccl", "gloo")}),
    "--report-to": SAME,
    "--wandb-notes": SAME,
    "--wandb-project-name": SAME,
    "--debug": Rule("same", "another name of --traceback: a run always says all that it has to say"),
    "--copy-codebase": Rule("refused", "install clipfast at a fixed version instead: runs do not read its source tree"),
    "--ddp-static-graph": SAME,
    "--fsdp": SAME,
    "--fsdp-no-reshard-after-forward": SAME,
    "--fsdp-offload-cpu": SAME,
    "--fsdp-checkpoint": Rule("same", "epoch_N.pt and the last checkpoint are one file in any case"),
    "--no-set-device-rank": SAME,
    "--seed": SAME,
    "--grad-clip-norm": SAME,
    "--lock-text": SAME,
    "--lock-text-unlocked-layers": SAME,
    "--lock-text-freeze-layer-norm": Rule("same", "layer norms are always locked with their block"),
    "--log-every-n-steps": SAME,
    "--log-metric-every-n-steps": Rule("same", "without it, metrics.jsonl has as many lines of training as the log"),
    "--train-loss-ema-samples": Rule(
        "accepted", "the loss in parentheses is the mean since the line before", {"type": COUNT}
    ),
    "--coca-caption-loss-weight": NO_COCA,
    "--coca-contrastive-loss-weight": NO_COCA,
    "--remote-sync": Rule("same", "fsspec does it, with s3:// too; --resume latest also brings the copy back"),
    "--remote-sync-frequency": SAME,
    "--remote-sync-protocol": Rule(
        "accepted", "the URL of --remote-sync says it, such as s3://", {"choices": ("s3", "fsspec")}
    ),
    "--delete-previous-checkpoint": Rule("same", "it concerns epoch_N.pt: epoch_latest.pt is replaced in any case"),
    "--distill-model": Rule("same", "it needs --distill-pretrained; it works with --accum-freq too"),
    "--distill-pretrained": Rule("same", "it needs --distill-model"),
    "--use-bnb-linear": Rule(
        "refused", "clipfast has no int8 layers: use --precision amp_fp8, which has the same recipe in fp8"
    ),
    "--siglip": Rule("same", "for models with SigLIP in their name, which have a logit_bias"),
    "--loss-dist-impl": Rule(
        "accepted", "the sigmoid loss always passes texts between ranks in the same way, with the same result",
        {"choices": ("bidir", "shift", "reduce", "gather")},
    ),
    "--use-naflex": Rule("same", "for models that are NaFlex already, such as naflex_ViT-B-16"),
    "--force-naflex-vision": Rule(
        "mapped", "changes nothing for a model that is NaFlex already; others are not converted",
        {"action": "store_true"},
    ),
    "--naflex-num-train-image-tokens": SAME,
    "--naflex-patch-sizes": Rule("same", "without it, the model's own, also in evaluation"),
    "--naflex-patch-size-probs": SAME,
    "--naflex-seq-lens": Rule("same", "images have so many patches at most, and are not padded to it"),
    "--naflex-seq-len-probs": SAME,
    "--naflex-max-tokens-per-batch": Rule(
        "same", "a resumed run keeps the budget of all processes together, on any number of them"
    ),
    "--naflex-max-text-tokens": Rule("refused", "it is for GenLIP, which clipfast does not train: leave it out"),
    "--naflex-batch-divisor": Rule("same", "a resumed run keeps it as it keeps the budget"),
    "--naflex-loss-scale": Rule("same", "the loss is logged without it"),
    "--length-bucketing": NO_BUCKETS,
    "--bucket-pool": NO_BUCKETS,
    "--bucket-chunk": NO_BUCKETS,
    "--bucket-prefetch-pools": NO_BUCKETS,
    "--naflex-pad-multiple": Rule("accepted", "it pads audio only, and here nothing is padded", {"type": COUNT}),
    "--text-pad-multiple": Rule(
        "refused", "the padding of texts is not computed, unless --no-pack-text asks for it: leave it out"
    ),
    "--text-attention-mask": Rule(
        "refused", "it is for captioners, and no model that clipfast trains reads it: leave it out"
    ),
    "--caption-z-loss-weight": NO_COCA,
    "--caption-loss-compute-dtype": NO_COCA,
    "--caption-loss-chunk-size": NO_COCA,
}  # fmt: skip


class _Refused(argparse.Action):
    """The argparse action of a refused flag of OpenCLIP, which raises an error that names a replacement."""

    def __init__(self, note: str, **options: Any) -> None:
        self.note = note
        super().__init__(nargs="*", **options)

    def __call__(self, *_: object) -> NoReturn:
        raise argparse.ArgumentError(self, f"this flag of OpenCLIP is not supported: {self.note}")


class _Accepted(argparse.Action):
    """The argparse action of an accepted flag of OpenCLIP, which ignores its value."""

    def __call__(self, *_: object) -> None:
        pass


ACTIONS: dict[str, Any] = {"mapped": "store", "accepted": _Accepted, "refused": _Refused}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of OpenCLIP that clipfast lacks; ``--help`` shows mapped and accepted flags in a last group."""
    group = parser.add_argument_group(GROUP, "docs/openclip-flags.md lists all flags of OpenCLIP")
    for name, rule in FLAGS.items():
        if rule.how == "same":
            continue
        is_refused = rule.how == "refused"
        takes = {"action": ACTIONS[rule.how], **({"note": rule.note} if is_refused else rule.takes)}
        shown = f"changes nothing: {rule.note}" if rule.how == "accepted" else rule.note
        group.add_argument(
            name, default=argparse.SUPPRESS, dest=name.strip("-").replace("-", "_"),
            help=argparse.SUPPRESS if is_refused else shown, **takes,
        )  # fmt: skip


def translated(given: Mapping[str, Any], earlier: Mapping[str, Any], *, resuming: bool) -> dict[str, Any]:
    """Translate flags of OpenCLIP: return the options of clipfast that the given flags stand for.

    Args:
        given: values of the flags.
        earlier: options that a recipe or a checkpoint sets.
        resuming: whether the batch size in ``earlier`` comes from a checkpoint.

    Raises:
        ValueError: the flags contradict each other.
    """
    options = dict(given)
    if options.pop("dataset_type", None) == "synthetic":
        pairs = options.get("train_num_samples", earlier.get("train_num_samples"))
        if pairs is None:
            raise ValueError("--dataset-type synthetic needs --train-num-samples, or use --train-data synthetic:65536")
        options["train_data"] = f"synthetic:{pairs}"
    factors = options.get("train_data_upsampling_factors", ())
    if factors and 0 < max(factors) < 1:  # OpenCLIP uses only their ratio; for clipfast, an epoch would be too short
        options["train_data_upsampling_factors"] = tuple(factor / max(factors) for factor in factors)
    passes = options.pop("accum_freq", 1)
    _check_naflex(options, earlier, passes)
    if passes < 1:
        raise ValueError(f"--accum-freq must be more than 0, got {passes}")
    if passes > 1:
        return options | _accumulated(passes, options, earlier, resuming=resuming)
    return options


def _check_naflex(given: dict[str, Any], earlier: Mapping[str, Any], passes: int) -> None:
    """Check OpenCLIP's flags for NaFlex, and remove ``--force-naflex-vision``, which has no effect, from ``given``.

    Raises:
        ValueError: the model is not NaFlex and would have to be converted, or ``--accum-freq`` (``passes``) joins
            batches.
    """
    from ..models.naflex_config import NaFlexConfig
    from ..models.registry import get_model_config, read_model_config

    use_naflex = given.get("use_naflex", earlier.get("use_naflex"))
    if given.pop("force_naflex_vision", False):
        model = str(given.get("model", earlier.get("model", TrainConfig.model)))
        config = read_model_config(model) if model.endswith(".json") else get_model_config(model)
        if not isinstance(config.vision, NaFlexConfig):
            raise ValueError(
                f"--force-naflex-vision: clipfast does not convert the image tower of {model}: give a --model that is "
                "NaFlex already, such as naflex_ViT-B-16"
            )
    if use_naflex and passes > 1:
        raise ValueError(
            f"--accum-freq {passes} with --use-naflex: the batches of several steps are not joined; give {passes} "
            "times the --naflex-max-tokens-per-batch, and --micro-batch-size"
        )


def _accumulated(
    passes: int, given: Mapping[str, Any], earlier: Mapping[str, Any], *, resuming: bool
) -> dict[str, Any]:
    """Return the options ``batch_size`` and ``micro_batch_size`` for OpenCLIP's ``--accum-freq`` (``passes``)."""
    for flag in ("--micro-batch-size", "--global-batch-size"):
        if flag.strip("-").replace("-", "_") in given:
            raise ValueError(f"--accum-freq {passes} and {flag} both say how a batch is divided: leave one out")
    if resuming and "batch_size" not in given:
        raise ValueError(f"--accum-freq {passes} with --resume needs --batch-size, the pairs of one pass")
    if earlier.get("global_batch_size") is not None and "batch_size" not in given:
        raise ValueError(
            f"--accum-freq {passes} would replace --global-batch-size {earlier['global_batch_size']}: give "
            "--batch-size, the pairs of one pass, or keep the batch and give --micro-batch-size instead of --accum-freq"
        )
    pairs = given.get("batch_size", earlier.get("batch_size", TrainConfig.batch_size))
    return {"batch_size": passes * pairs, "micro_batch_size": pairs}


TITLES = {
    "same": "The same here",
    "mapped": "Mapped to other options",
    "accepted": "Accepted without effect",
    "refused": "Refused",
}
"""The title of the section of ``docs/openclip-flags.md`` for the flags with each ``Rule.how``."""


def page() -> str:
    """Return the text of ``docs/openclip-flags.md``."""
    return INTRODUCTION + "".join(map(_section, TITLES))


INTRODUCTION = """\
# OpenCLIP's flags

`clipfast train` takes the training commands of OpenCLIP: write it in place of `python -m open_clip_train.main`, and
`clipfast train` in place of `open_clip_train.main` after `torchrun ... -m` and `srun python -m`. (With `--logs`, write
`torchrun ... -m clipfast -- train`: otherwise torchrun takes the flag for one of its own, as with OpenCLIP's trainer.)
This page lists every flag of its main branch (89fb801), and the four of 4.2.1 that its files for captioners name.
`python -m clipfast.cli.open_clip_flags` writes it, from the table that the command itself uses.

A flag that is left out may have another value here (batches, warm-up, model and so on): `--recipe openclip-defaults`
gives all of them OpenCLIP's values. A command without `--train-data` evaluates, as `clipfast eval zeroshot` does.
"""


def _section(how: str) -> str:
    """Return a section of ``docs/openclip-flags.md``: the table of the flags with this ``Rule.how``."""
    rows = "".join(f"| `{name}` | {rule.note} |\n" for name, rule in FLAGS.items() if rule.how == how)
    heading = "what to use" if how == "refused" else "what differs" if how == "same" else "what it is here"
    return f"\n## {TITLES[how]}\n\n| flag | {heading} |\n|---|---|\n{rows}"


if __name__ == "__main__":
    print(page(), end="")
