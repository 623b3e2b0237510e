"""``clipfast eval``: its parser, with a subcommand for each task."""

from typing import Any

from .tasks import bias, compositional, overlap, probe, retrieval, robustness, suite, zeroshot

# Each of these modules adds the parser of its task, and imports PyTorch and other slow packages when the task runs.
TASKS = (zeroshot, retrieval, probe, robustness, compositional, overlap, bias, suite)


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast eval`` with all its tasks. Files and names are checked when a task runs."""
    parser = commands.add_parser("eval", description="Evaluate checkpoints on one of the tasks below.")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for task in TASKS:
        task.add_parser(tasks)
