"""Say what a checkpoint is, without building a model: its layout, the model, parameters, activation, step and checksum.

It reads checkpoints of OpenCLIP and clipfast (.pt, .bin, .safetensors), folders with open_clip_config.json, folders of
transformers' CLIPModel or SiglipModel and of torch.distributed.checkpoint, hf-hub:ORG/REPO, MODEL:TAG of clipfast
list-pretrained and, with --trust, OpenAI's TorchScript archives. The checksums in a file of torch.save are
verified, and no code of a pickle is run.
"""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from ..io.files import replace_text
from ..io.text import align
from ..io.units import BYTES, scaled
from .arguments import CACHE_DIR, TRUST, add_output

if TYPE_CHECKING:
    from ..checkpoints.inspection import CheckpointInfo

EPILOG = """\
examples:
  clipfast inspect-checkpoint runs/demo
  clipfast inspect-checkpoint epoch_32.pt --json epoch_32.json

exit code: 0 printed, 2 the checkpoint cannot be read, or holds no model that clipfast can build"""


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast inspect-checkpoint``."""
    parser = commands.add_parser(
        "inspect-checkpoint",
        description=__doc__,
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="file, folder, hf-hub:ORG/REPO or MODEL:TAG to look at")
    add("--cache-dir", **CACHE_DIR)
    add("--trust", **TRUST)
    add_output(parser, "--json", help="also write everything to FILE")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast inspect-checkpoint``: print what the checkpoint is, and return the exit code."""
    from ..checkpoints.inspection import inspect_checkpoint

    info = inspect_checkpoint(args.file, trust=args.trust, cache_dir=args.cache_dir)
    print(describe(info))
    if args.json is not None:
        replace_text(args.json, json.dumps(dataclasses.asdict(info), indent=2) + "\n")
    return 0


def describe(info: "CheckpointInfo") -> str:
    """Return the text table that ``clipfast inspect-checkpoint`` prints: layout, model, parameters and more."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in info.dtypes.items())
    images = f"{info.image_size} x {info.image_size}, {info.resize_mode} side resized, {info.interpolation}"
    if info.resize_mode != "shortest":
        images = f"{info.image_size} x {info.image_size}, resize mode {info.resize_mode}, {info.interpolation}"
    rows: list[tuple[str, object]] = [
        ("layout", info.layout),
        ("model", " or ".join(info.models) or "none that clipfast knows by name"),
        ("parameters", f"{info.parameters:,} (tensors: {dtypes})"),
        ("activation", info.activation or "not said"),
        ("images", images),
        ("mean, std", f"{', '.join(map(str, info.mean))}; {', '.join(map(str, info.std))}"),
        ("texts", f"{info.context_length} tokens"),
        ("epoch", "not said" if info.epoch is None else info.epoch),
        ("step", "not said" if info.step is None else f"{info.step:,}"),
        ("size", scaled(info.file_bytes, BYTES)),
        *((f"SHA-256 {name}" if len(info.sha256) > 1 else "SHA-256", digest) for name, digest in info.sha256.items()),
    ]
    return f"{info.source}\n{align(rows, indent='  ')}"
