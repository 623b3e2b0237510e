"""``clipfast embed``: compute the features of pictures and texts, and write them to a folder for other commands."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluate.results import report_left_out
from ..io.progress import Advance, progress
from ..train.option_checks import SOURCE_OPTIONS, keys_of, separator_of
from .arguments import BATCH, DIST_TIMEOUT, WORKERS
from .eval_arguments import add_backend_argument, add_device_argument, add_model_arguments, load_encoder
from .options import add_arguments

if TYPE_CHECKING:  # these modules load PyTorch, which --help must not do, so they are imported for annotations only
    from ..data import Skipped
    from ..distributed.world import World
    from ..search.embed import Work

DATA_HELP = (
    "a folder of pictures, with or without captions and sub-folders, or pairs as --train-data of clipfast train takes "
    "them: shards, Parquet, CSV; 'bundled:emoji/fluent' ships with the package"
)
MAX_WORKERS = 8  # the default number of data workers is at most this


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast embed``. Files and names are checked when the command runs."""
    parser = commands.add_parser(
        "embed",
        description="Compute the features of the pictures or the texts of a source and write them to a folder, as "
        "numbered parts in clip-retrieval's layout. Given again, the same command goes on where it was stopped. "
        "torchrun shares the parts between processes, and --engine ray between machines; the content stays the same.",
        epilog="Example: clipfast embed --model ViT-B-32 --pretrained openai --data photos --output embedded",
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--data", required=True, help=DATA_HELP)
    add_arguments(parser, SOURCE_OPTIONS)
    add("--output", required=True, type=Path, metavar="FOLDER", help="folder for the features and the metadata")
    both = "(default: both, if one of the first 64 samples has a caption, and otherwise images)"
    add("--images", action="store_true", help=f"embed images; with --texts, both {both}")
    add("--texts", action="store_true", help="embed captions; a sample without a caption is left out")
    kept = "json keys or columns to keep as metadata; the flag without a key keeps none (default: all)"
    add("--metadata", nargs="*", metavar="KEY", help=kept)
    eight = "with fp8, the blocks of the model multiply in 8 bits, and the features are in fp16"
    help_text = f"precision of the features in the folder; {eight} (default: fp16)"
    add("--precision", default="fp16", choices=("fp16", "fp32", "fp8"), help=help_text)
    add("--part-size", type=BATCH, default=10_000, help="samples of a part (default: 10000)")
    batch = "samples to encode at once (default: 256 on a GPU, 32 for each thread of a CPU, up to 128 of small images)"
    add("--batch-size", type=BATCH, help=batch)
    most = "as many as cores for a GPU, half as many for a CPU, at most 8, and not more than fit into shared memory"
    actors = "with --engine ray, its actors (default: one for each GPU, or else for each CPU)"
    add("--workers", type=WORKERS, help=f"processes that read and decode (default: {most}); {actors}")
    engine = "local: this process, or those of torchrun; ray: actors on a cluster (pip install 'clipfast[ray]')"
    add("--engine", default="local", choices=("local", "ray"), help=f"{engine} (default: local)")
    add_device_argument(parser)
    add_backend_argument(parser)
    add("--dist-timeout", **DIST_TIMEOUT)
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast embed``: embed the missing parts, print the number of samples, and return the exit code."""
    if args.engine == "ray" and args.workers == 0:
        raise ValueError("--workers 0 leaves --engine ray no actor: leave it out, or give at least 1")
    from ..distributed.world import joined

    with joined(args.device, args.dist_timeout) as world, _held(args.output, world):
        return _run(args, world)


def _run(args: argparse.Namespace, world: World) -> int:
    """Run ``clipfast embed`` in one of the processes of ``world``, and return the exit code."""
    from ..distributed.world import INDEXING
    from ..search.embed import SKIPPED_FILE

    work = work_of(args, world)
    world.on_main(work.begin)
    missing = world.on_main(work.missing)
    for sentence in [*work.samples.losses(), *(work.samples.others() if missing else [])] if world.is_main else []:
        print(f"clipfast embed: {sentence}", file=sys.stderr)
    mine = missing[world.rank :: world.size]
    started = time.perf_counter()
    with world.phase("embedding"), _bar(work, mine if args.engine == "local" else missing, world) as advance:
        if args.engine == "ray":
            make_parts(args, work, missing, advance)
        else:
            work.make(mine, _workers(args, work, world), advance)
    world.meet(INDEXING)  # a barrier with a long timeout, since the ranks may take very different times
    seconds = time.perf_counter() - started
    rows, skipped = world.on_main(work.finish)
    if world.is_main:
        _print_skipped(skipped, wants_texts=args.texts)
        made = sum(len(work.parts[number]) for number in missing)
        left_out = f", {len(skipped):,} left out (see {args.output / SKIPPED_FILE})" if skipped else ""
        speed = f"{made:,} samples in {seconds:,.1f} s, {made / seconds:,.1f} a second"
        print(f"{args.output} holds {rows:,} samples{left_out}; now: {speed}")
    return 0


def work_of(args: argparse.Namespace, world: World) -> Work:
    """Open the source and load the model that the arguments of ``clipfast embed`` name; return them as ``Work``.

    Raises:
        ValueError: the model or the source cannot be used, or the arguments do not fit.
    """
    from ..search.embed import Work
    from ..search.source_samples import Samples

    options = vars(args)
    keys, separator = keys_of(options), separator_of(options)
    with world.local_first():  # the first process of each machine indexes the source, and the others read its index
        samples = Samples(args.data, args.images, args.texts, keys, separator, args.metadata)
    if not (args.images or args.texts):
        samples.images, samples.texts = True, samples.have_captions()
    encoder = load_encoder(args, args.model, args.pretrained, world)
    if args.precision == "fp8":
        encoder.set_fp8("switchback")
    return Work(encoder, samples, args.output, args.precision, args.part_size, args.batch_size)


def _workers(args: argparse.Namespace, work: Work, world: World) -> int:
    """Return the number of data workers of ``clipfast embed``.

    The default is limited by the CPU cores, and by shared memory, of which the workers' batches fill at most half.
    """
    if args.workers is not None:
        return int(args.workers)
    from ..data import PREFETCH
    from ..host import SHARED_MEMORY, cores, free_bytes

    own = cores() // world.local_size
    most = min(MAX_WORKERS, own if world.device(args.device).type == "cuda" else own // 2)
    if not SHARED_MEMORY.is_dir():
        return 0
    held = 2 * world.local_size * PREFETCH * work.batch_bytes
    return min(most, free_bytes(SHARED_MEMORY) // held) if held else most


@contextlib.contextmanager
def _held(folder: Path, world: World) -> Iterator[None]:
    """Lock the output folder of ``clipfast embed``, so no other process writes to it."""
    from ..runs.lock import locked
    from ..search.embed import refuse_others

    with contextlib.ExitStack() as stack:

        def hold() -> None:
            """Lock the output folder of ``clipfast embed``; refuse a folder that holds something else."""
            refuse_others(folder)  # this check comes first, since the lock is a file in the folder
            stack.enter_context(locked(folder, "--output"))

        world.on_main(hold)
        yield


def _bar(work: Work, numbers: Sequence[int], world: World) -> contextlib.AbstractContextManager[Advance]:
    """Return the progress bar of ``clipfast embed`` on rank 0, for the samples in the parts ``numbers``."""
    total = sum(len(work.parts[number]) for number in numbers)
    unit = "images" if work.samples.images else "texts"
    return progress(total, unit, unit, shown=world.is_main)


def _print_skipped(skipped: Sequence[tuple[int, Skipped]], *, wants_texts: bool) -> None:
    """Print which samples ``clipfast embed`` left out; suggest --images for pictures without captions."""
    report_left_out((one for _, one in skipped), "embed")
    silent = sum(one.kind == "no caption" for _, one in skipped)
    if silent and not wants_texts:
        hint = "with --images (and a new --output) they are embedded too"
        print(f"clipfast embed: {silent:,} have no caption: {hint}", file=sys.stderr)


class PartMaker:
    """A Ray actor of ``clipfast embed --engine ray`` that embeds parts of the source.

    If it is killed, another actor embeds its unfinished part again.

    Args:
        args: arguments of the command.
        folder: the working directory, to which paths in the arguments are relative.
    """

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        from ..distributed.world import ALONE

        os.chdir(folder)
        self.work = work_of(args, ALONE)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embed the parts with the numbers ``batch["part"]``, unless they exist already, and return ``batch``."""
        numbers = [int(number) for number in batch["part"]]
        self.work.make([number for number in numbers if not self.work.holds(number)])
        return batch


def make_parts(args: argparse.Namespace, work: Work, numbers: Sequence[int], advance: Callable[[int], object]) -> None:
    """Embed the parts ``numbers`` of a source on an existing Ray cluster (RAY_ADDRESS), or on this machine.

    Args:
        args: arguments of the command. All machines must see model, data and output under the same names.
        work: source, model and options of the command.
        numbers: numbers of the parts.
        advance: a function that is called with the number of newly finished samples.

    Raises:
        ValueError: Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--engine ray needs Ray: pip install 'clipfast[ray]'") from error
    if not numbers:
        return
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = ray.cluster_resources().get("GPU", 0) if args.device != "cpu" else 0
    actors = args.workers or int(gpus or ray.cluster_resources().get("CPU", 1))
    parts = ray.data.from_items([{"part": number} for number in numbers], override_num_blocks=len(numbers))
    done = parts.map_batches(
        PartMaker, fn_constructor_args=(args, os.getcwd()), batch_size=1, num_gpus=1 if gpus else None,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(actors, len(numbers)))),
    )  # fmt: skip
    try:
        for row in done.iter_rows():
            advance(len(work.parts[row["part"]]))
    finally:
        ray.shutdown()
