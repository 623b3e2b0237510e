"""What a test starts ends with it, and can be ended by signals wherever the tests run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TEST = """
import signal, subprocess, sys
from pathlib import Path

CHILD = '''
import os, signal, subprocess, sys, time
late = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(signal.getsignal(signal.SIGHUP) == signal.SIG_DFL, os.getpid(), late.pid, flush=True)
time.sleep(600)
'''

def test_that_fails(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    Path("said").write_text(process.stdout.readline())
    if PARENT_ENDS:
        process.kill()
    assert False

def test_that_passes(tmp_path):
    (tmp_path / "large").write_text("x")
"""


@pytest.mark.long
def test_a_test_that_fails_leaves_no_process(tmp_path, monkeypatch):
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", root / "pyproject.toml", "--basetemp=made"]
    for parent_ends in (False, True):
        (tmp_path / "test_inner.py").write_text(f"PARENT_ENDS = {parent_ends}\n{TEST}")
        done = subprocess.run(
            ["nohup", *command, "-p", "no:cacheprovider", "test_inner.py"], cwd=tmp_path, capture_output=True,
            text=True, env=os.environ | {"PYTHONPATH": str(root)},
        )  # fmt: skip
        assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
        takes_signals, *pids = (tmp_path / "said").read_text().split()
        assert takes_signals == "True"
        assert [pid for pid in pids if Path("/proc", pid).exists()] == []
        assert not (tmp_path / "made" / "test_that_passes0").exists()
