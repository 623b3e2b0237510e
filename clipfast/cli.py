"""The command line, ``clipfast COMMAND``: a table of commands, of which only the chosen one is imported."""

import argparse
import pkgutil
import sys
from collections.abc import Callable, Sequence

# Name, one line for ``clipfast --help``, and the module whose ``add_parser`` adds the command's parser and runner.
COMMANDS = {
    "train": ("train a model on image-text shards", "clipfast.training.command"),
    "eval": ("evaluate a checkpoint", "clipfast.evaluation.command"),
    "verify": ("check the numerics of kernels, model and training", "clipfast.verify.command"),
    "plan": ("predict memory, FLOPs, traffic and time of the loss on many GPUs", "clipfast.plan.command"),
    "inspect": ("show what the compiler made of every kernel, without a GPU", "clipfast.bench.inspection.command"),
}
BENCH = ("bench", "time ops, training steps and data loading against other implementations", "clipfast.bench.cli")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 if the user made a mistake, which is one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = arguments[0] if arguments else ""
    if chosen == BENCH[0]:
        bench: Callable[..., int] = pkgutil.resolve_name(f"{BENCH[2]}:main")
        return bench(arguments[1:], prog="clipfast bench")
    args = _parser(chosen).parse_args(arguments)
    shown: Exception
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"clipfast {args.command}: interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        hint, shown = "; install what it needs: pip install 'clipfast[data,eval]'", error
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        hint, shown = "", error
    if args.traceback:
        raise shown
    print(f"clipfast {args.command}: error: {shown}{hint}", file=sys.stderr)
    return 2


def _parser(chosen: str) -> argparse.ArgumentParser:
    """Return the parser with the whole of the chosen command, or else with the name and help line of every command."""
    parser = argparse.ArgumentParser(prog="clipfast", description="Train and evaluate CLIP on Triton kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    if chosen in COMMANDS:
        add_parser: Callable[[object], None] = pkgutil.resolve_name(f"{COMMANDS[chosen][1]}:add_parser")
        add_parser(commands)
        return parser
    for name, (text, _) in {**COMMANDS, BENCH[0]: BENCH[1:]}.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser
