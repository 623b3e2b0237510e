"""List the published weights that clipfast loads by name: models, tags, and repositories on the Hugging Face hub.

A model and a tag of this list are --model and --pretrained of other commands, and the arguments of
clipfast.create_model; MODEL:TAG is the source of clipfast convert and clipfast inspect-checkpoint. Weights are
downloaded when they are first used, by huggingface_hub (pip install 'clipfast[hub]'), into its cache: HF_HOME moves the
cache, and with HF_HUB_OFFLINE=1 nothing but the cache is used.
"""

import argparse
import json
from typing import Any

from ..io.text import align

EPILOG = """\
examples:
  clipfast list-pretrained
  clipfast list-pretrained --model ViT-B-32
  clipfast list-pretrained --tag openai
  clipfast eval zeroshot --model ViT-B-32 --pretrained laion2b_s34b_b79k --data images/
  clipfast eval zeroshot --model hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K --data images/
  clipfast convert ViT-B-32:openai for_transformers --to hf

exit code: 0 listed, 2 there is nothing of that name"""


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast list-pretrained``."""
    parser = commands.add_parser("list-pretrained", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--model", metavar="NAME", help="only the weights of this model")
    add("--tag", metavar="TAG", help="only the weights of this tag")
    add("--json", action="store_true", help="print everything that is known of each, as JSON")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast list-pretrained``: print the list, and return the exit code."""
    from ..checkpoints.pretrained import find_pretrained

    found = find_pretrained(args.model, args.tag)
    if args.json:
        print(json.dumps([{"model": model, "tag": tag, **entry} for model, tag, entry in found], indent=2))
        return 0
    rows = [
        (f"{model}:{tag}", entry["hf_hub"].rstrip("/") + (", QuickGELU" if entry.get("quick_gelu") else ""))
        for model, tag, entry in found
    ]
    print(align([("MODEL:TAG", "repository"), *rows]))
    return 0
