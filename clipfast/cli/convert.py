"""Convert a checkpoint into the layout of OpenCLIP, transformers or clipfast.

The layout of SRC is recognised. It may be a checkpoint of OpenCLIP or clipfast (.pt, .bin or .safetensors, from
training or bare, with or without the prefixes of DistributedDataParallel and torch.compile), a folder with
open_clip_config.json, a folder of transformers' CLIPModel or SiglipModel, a folder of torch.distributed.checkpoint
(DCP) or, with --trust, OpenAI's TorchScript archive. From the Hugging Face hub, SRC is hf-hub:ORG/REPO in either
layout, or MODEL:TAG as clipfast list-pretrained shows them.

Weights keep their bits. The activation, the preparation of images, the context length and a tokenizer's files are
copied if the new layout can store them; the state of training is not copied. Nothing is guessed: if SRC does not say
something that is needed, an error names the flag that can say it.
"""

import argparse
from typing import Any

from ..checkpoints import TARGETS
from .arguments import CACHE_DIR, PIXELS, TRUST, Count, add_output

EPILOG = """\
layouts:
  open_clip  a folder with open_clip_config.json and weights; OpenCLIP and clipfast load it as local-dir:DST
  hf         a folder with config.json, weights, image processor and tokenizer; CLIPModel.from_pretrained(DST), or
             SiglipModel.from_pretrained(DST), loads it
  clipfast   a .pt file; clipfast.create_model(DST) builds its model

examples:
  clipfast convert epoch_32.pt exported --to open_clip --model ViT-B-32
  clipfast convert local-dir:exported for_transformers --to hf
  clipfast convert for_transformers larger.pt --to clipfast --image-size 336
  clipfast convert hf-hub:openai/clip-vit-base-patch32 clip.pt --to clipfast
  clipfast convert ViT-B-32:laion2b_s34b_b79k for_transformers --to hf

exit code: 0 DST is written, 2 an error, and DST does not exist"""


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast convert``. Files and names are checked when the command runs."""
    parser = commands.add_parser("convert", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("source", metavar="SRC", help="file, folder, hf-hub:ORG/REPO or MODEL:TAG to convert")
    destination = "file or folder to write, which must not exist"
    add_output(parser, "destination", metavar="DST", nargs="?", is_held=False, help=destination)
    add_output(parser, "--output", dest="destination", metavar="DST", is_held=False, help="the same as DST")
    add("--to", required=True, metavar="LAYOUT", help=f"layout of DST: {', '.join(TARGETS)}")
    add("--model", metavar="NAME", help="the model, if SRC does not say it: a name, or a JSON file as OpenCLIP's")
    add(
        "--activation",
        metavar="NAME",
        help="gelu or quick_gelu, if SRC does not say it or is wrong; for SigLIP gelu, "
        "gelu_tanh, or one for images and one for texts: gelu,gelu_tanh",
    )
    add("--image-size", type=PIXELS, metavar="PIXELS", help="resize the positions of patches to images of this size")
    add("--context-length", type=Count(2, 2**16), metavar="TOKENS", help="resize the positions of texts to this length")
    add("--cache-dir", **CACHE_DIR)
    add("--trust", **TRUST)
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast convert``: convert the checkpoint, print what was written, and return the exit code."""
    from ..checkpoints.convert import convert_checkpoint
    from .inspect_checkpoint import describe

    if args.destination is None:
        raise ValueError("name the file or folder to write: clipfast convert SRC DST --to LAYOUT")
    info = convert_checkpoint(
        args.source, args.destination, args.to, model=args.model, activation=args.activation,
        image_size=args.image_size, context_length=args.context_length, trust=args.trust,
        cache_dir=args.cache_dir, overwrite=args.overwrite,
    )  # fmt: skip
    print(f"wrote {describe(info)}")
    return 0
