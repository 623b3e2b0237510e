"""What the tests of the benchmarks share."""

import pytest

from clipfast.bench import session
from clipfast.bench.harness import Budget

from ..conftest import INTERPRET
from .cases import CPU, ROOFS, SCHEMA


@pytest.fixture(autouse=True)
def compiled_kernels():
    """Skip on the interpreter leg: benchmarks time what users run."""
    if INTERPRET:
        pytest.skip("benchmarks time what users run")


@pytest.fixture
def no_roofs(monkeypatch):
    """Sessions that do not measure the machine, which takes seconds."""
    monkeypatch.setattr(session, "measure_roofs", lambda device, dtype: ROOFS)


@pytest.fixture
def run_session(monkeypatch, no_roofs, tmp_path):
    """A function that measures the given cases in a session, and returns a result that fits the schema."""

    def run(*cases, **options):
        left = iter(cases)
        monkeypatch.setattr(session, "build", lambda *key: next(left))
        options = {"memory": False, "plots": False, **options}
        keys = [("loss", {}, "fp32")] * len(cases)
        result = session.measure_all(keys, CPU, Budget(0.0, 2, 2), tmp_path / "run.json", **options)
        pytest.importorskip("jsonschema").validate(result, SCHEMA)
        return result

    return run
