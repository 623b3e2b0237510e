"""How far an asynchronous copy lies before the instruction that waits for it: what runs between them hides it.

A loop that is pipelined in N stages copies tiles of later iterations. If the copies are the last thing of an iteration
and their wait is the first of the next one, nothing is hidden, whatever the number of stages promises.
"""

from .sass import Graph, Instruction, UnknownControlFlow

COMMIT, WAIT, SCOREBOARD = "LDGDEPBAR", "DEPBAR", "SB0"  # the assembler counts groups of copies on no other one


def copy_distances(instructions: list[Instruction]) -> tuple[int, ...]:
    """Return, for each innermost loop with asynchronous copies, the fewest instructions between a copy and its wait.

    Copies are committed in groups (LDGDEPBAR). A wait (DEPBAR.LE SB0, n) lets the latest n groups run on, so it waits
    for the group before them, which may be of an earlier iteration. Loops without such a wait have no distance.
    """
    try:
        bodies = _innermost_loops(Graph(instructions))
    except UnknownControlFlow:
        return ()
    found = map(_distance, bodies)
    return tuple(distance for distance in found if distance is not None)


def _innermost_loops(graph: Graph) -> list[list[Instruction]]:
    """Return the instructions of each loop that has none inside, in the order of their addresses."""
    last: dict[int, int] = {}  # for each block that a loop begins with, the last block that branches back to it
    for block in graph.order:
        for header in graph.successors[block]:
            if header <= block and graph.dominates(header, block):
                last[header] = max(block, last.get(header, block))
    outer = {first for first, end in last.items() if any(first < other and last[other] <= end for other in last)}
    return [
        [step for block in graph.blocks[header : end + 1] for step in block]
        for header, end in sorted(last.items())
        if header not in outer
    ]


def _distance(body: list[Instruction]) -> int | None:
    """Return the fewest instructions between a commit and its wait in a loop, both in the order of the addresses."""
    commits = [position for position, step in enumerate(body) if step.name == COMMIT]
    waits = [(position, groups) for position, step in enumerate(body) if (groups := _running_on(step)) is not None]
    if not commits or not waits:
        return None
    distances = []
    for position, groups in waits:
        before = sum(commit < position for commit in commits)
        # number of the awaited group; a negative one is of an earlier iteration
        turns, commit = divmod(before - 1 - groups, len(commits))
        distances.append(position - commits[commit] - turns * len(body) - 1)
    return min(distances)


def _running_on(step: Instruction) -> int | None:
    """Return the number of groups that a wait for copies lets run on, or None for another instruction."""
    scoreboard, _, number = step.operands.partition(",")
    if step.name != WAIT or "LE" not in step.modifiers or scoreboard.strip() != SCOREBOARD:
        return None
    return int(number.strip().split()[0].rstrip(","), 16)
