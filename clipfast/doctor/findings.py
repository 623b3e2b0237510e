"""What a look at a part of the machine finds."""

import dataclasses
from collections.abc import Callable, Iterable

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: of what was looked at.
        value: what was found.
        status: "ok", "note" (worth knowing) or "problem" (clipfast does not work, or not as it should).
        fix: what to do about it.
    """

    name: str
    value: str
    status: str = OK
    fix: str = ""


def judged(name: str, value: str, status: str, fix: str, *, applies: bool) -> Finding:
    """Return a finding that has a status and a fix if it ``applies``, and is fine otherwise."""
    return Finding(name, value, status, fix) if applies else Finding(name, value)


def looked(look: Callable[[], Iterable[Finding]], *, traceback: bool = False) -> list[Finding]:
    """Return all that a look finds; an error ends it, and is a finding too, unless ``traceback`` is True."""
    found: list[Finding] = []
    try:
        found.extend(look())
    except ImportError as error:
        fix = "pip install 'clipfast[data,eval]' installs all that training needs"
        found.append(Finding("missing", f"the rest needs {error.name}, which is not there", PROBLEM, fix))
    except Exception as error:  # one part of a machine must not hide the others
        if traceback:
            raise
        found.append(Finding("failed", f"{type(error).__name__}: {error}", PROBLEM, "see clipfast doctor --traceback"))
    return found
