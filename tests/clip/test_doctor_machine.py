"""``clipfast doctor`` says what processors, memory, software and folders there are, and what is wrong with them."""

import errno
import os
import resource
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast.doctor import folders, machine, software
from clipfast.doctor.findings import NOTE, OK, PROBLEM

from . import test_host
from .test_doctor import by_name
from .test_host import GIB, files, meminfo


class TestMachine:
    """Processors, memory and limits."""

    def test_processors(self, tmp_path, monkeypatch):
        root = files(tmp_path, test_host.TestHost.V2 | {"proc/cpuinfo": "flags: x\nmodel name\t: A Processor"})
        monkeypatch.setattr(machine, "cores", lambda: 4)
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        monkeypatch.setattr(os, "getloadavg", lambda: (1.4, 0, 0))
        found = by_name(machine.processors(root))
        assert (found["name"].value, found["cores"].value, found["load"].status) == ("A Processor", "4 of 8", OK)
        assert (found["quota"].value, found["quota"].status) == ("time of 1.5 cores", NOTE)
        assert "at most 1 --workers" in found["quota"].fix
        monkeypatch.setattr(os, "getloadavg", lambda: (1.6, 0, 0))  # beyond the quota
        assert by_name(machine.processors(root))["load"].status == NOTE

    @pytest.mark.parametrize(("missing", "status"), [(0, OK), (1024, PROBLEM)])
    def test_memory(self, missing, status, tmp_path):
        root = files(tmp_path, meminfo(64 * GIB, machine.LEAST_MEMORY - missing))
        assert by_name(machine.memory(root))["memory"].status == status
        assert "limit" not in by_name(machine.memory(root))

    def test_memory_of_a_container(self, tmp_path):
        found = by_name(machine.memory(files(tmp_path, test_host.TestHost.V2)))
        assert found["memory"].value == "3.00 GiB of 64.0 GiB available"
        assert found["limit"].status == NOTE

    def test_unknown_memory(self, tmp_path):
        assert by_name(machine.memory(tmp_path))["memory"].status == NOTE

    def test_shared_memory(self, tmp_path, monkeypatch):
        needed = 2 * 256 * (3 * 224 * 224 + 77 * 8)
        monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
        for free, status in ((needed, OK), (64 << 20, PROBLEM)):  # Docker gives 64 MiB
            monkeypatch.setattr(machine, "free_bytes", lambda _, free=free: free)
            found = by_name(machine.memory())["shared memory"]
            assert found.status == status
            assert "73.8 MiB" in found.value
        assert "--shm-size=8g" in found.fix
        monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
        assert by_name(machine.memory())["shared memory"].status == PROBLEM

    def test_limits(self, monkeypatch):
        values = {limit.number: (limit.least, resource.RLIM_INFINITY) for limit in machine.LIMITS}
        values[resource.RLIMIT_MEMLOCK] = (resource.RLIM_INFINITY,) * 2
        monkeypatch.setattr(resource, "getrlimit", values.get)
        assert {finding.status for finding in machine.limits()} == {OK}
        values |= dict.fromkeys(values, (resource.RLIM_INFINITY,) * 2)
        assert {(finding.value, finding.status) for finding in machine.limits()} == {("unlimited", OK)}
        for limit in machine.LIMITS[:3]:
            values[limit.number] = (limit.least - 1, limit.least)
        values[resource.RLIMIT_MEMLOCK] = (8 << 20, 8 << 20)
        found = by_name(machine.limits())
        assert [finding.status for finding in found.values()] == [PROBLEM] * 3 + [NOTE]
        assert found["open files"].value == "1,023 of 1,024"
        assert found["open files"].fix.startswith("ulimit -n 1024: ")
        assert found["size of a file"].fix.startswith("ulimit -f 16777216: ")  # in KiB


class TestSoftware:
    """Versions, packages and variables."""

    @pytest.mark.parametrize(
        ("version", "least", "expected"),
        [
            ("2.11.0", "2.11", False), ("2.9.1", "2.11", True), ("2.13.0+cpu", "2.11", False), ("3", "3.6", True),
            ("2.11.0a0+git1", "2.11", False), ("2026.9.0", "2024.6", False), ("1.0", "", False),
        ],
    )  # fmt: skip
    def test_versions_are_compared_by_number(self, version, least, expected):
        assert software.is_older(version, least) is expected

    def test_what_clipfast_needs_is_read_from_its_metadata(self):
        found = {(one.package, one.extra): one.least for one in software.requirements()}
        assert found["torch", ""] == "2.11"
        assert found["fsspec", "data"] == "2024.6"
        assert found["open-clip-torch", "test"] == "3.3.0"

    def test_this_environment(self):
        assert {finding.status for finding in software.versions()} == {OK}
        found = by_name(software.versions())
        assert found["torch"].value == torch.__version__
        assert "CUDA" in found

    def test_old_and_missing_packages(self, monkeypatch):
        versions = {"torch": "2.1.0", "triton": None, "braceexpand": "0.1", "tokenizers": None}
        original = software.installed
        monkeypatch.setattr(software, "installed", lambda name: versions.get(name, original(name)))
        monkeypatch.setattr(software.platform, "python_version", lambda: "3.10.4")
        found = by_name(software.versions())
        assert found["torch"].value == "2.1.0, and clipfast needs 2.11 or newer"
        assert (found["triton"].value, found["triton"].fix) == ("not installed", "pip install 'triton>=3.6'")
        assert [found[name].status for name in ("torch", "triton", "Python", "numpy")] == [PROBLEM] * 3 + [OK]
        found = by_name(software.packages())
        assert (found["braceexpand"].status, found["tokenizers"].status, found["tqdm"].status) == (PROBLEM, NOTE, OK)
        assert found["tokenizers"].fix == "pip install 'clipfast[siglip]'"
        assert "pytest" not in found
        assert len(found) == len(list(software.packages()))  # each is listed once

    @pytest.mark.parametrize(
        ("name", "value", "status"),
        [
            ("TRITON_INTERPRET", "1", PROBLEM), ("TRITON_INTERPRET", "0", OK), ("TRITON_CACHE_DIR", "/x", OK),
            ("CLIPFAST_CACHE_BYTES", "64G", PROBLEM), ("CLIPFAST_CACHE_BYTES", "64", OK), ("CLIPFAST_CACHE", "/x", OK),
            ("CLIPFAST_CASHE", "/x", NOTE), ("CLIPFAST_DISABLE", "loss", NOTE), ("OMP_NUM_THREADS", "9999", NOTE),
            ("OMP_NUM_THREADS", "many", NOTE), ("OMP_NUM_THREADS", "1", OK), ("CUDA_VISIBLE_DEVICES", "", NOTE),
            ("CUDA_VISIBLE_DEVICES", "0", OK), ("NCCL_DEBUG", "INFO", OK),
        ],
    )  # fmt: skip
    def test_variables(self, name, value, status):
        (found,) = software.variables({name: value, "PATH": "/x"})
        assert (found.name, found.value, found.status) == (name, repr(value), status)
        assert bool(found.fix) == (status != OK)

    def test_no_variables(self):
        assert [finding.status for finding in software.variables({"PATH": "/x"})] == [OK]

    def test_every_variable_of_ours_is_known(self):
        root = Path(software.__file__).parent.parent
        text = "\n".join(path.read_text() for path in root.rglob("*.py") if path.parent.name != "doctor")
        from clipfast import run
        from clipfast.data import index, staging

        for name in (run.VARIABLE, index.CACHE_VARIABLE, staging.MAX_BYTES_VARIABLE):
            assert name in software.OURS
            assert f'"{name}"' in text


class TestFolders:
    """Folders for the cache and for runs."""

    @pytest.fixture(autouse=True)
    def small(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folders, "TRIED", 1 << 20)
        monkeypatch.setattr(folders, "CHUNK", 1 << 18)
        monkeypatch.setattr(folders, "SLOW", 0)
        monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))

    def test_nothing_is_left(self, tmp_path):
        found = by_name(folders.folders(tmp_path / "runs"))
        assert list(tmp_path.iterdir()) == []
        assert {finding.status for finding in found.values()} == {OK}
        assert f"cache, to be made in {tmp_path}, has" in found["cache"].value
        assert found["cache, speed"].value.startswith("writes ")
        assert found["runs, speed"].value == "the same disk as of cache"

    def test_a_file_in_place_of_a_folder(self, tmp_path):
        (tmp_path / "runs").touch()
        found = by_name(folders.folders(tmp_path / "runs/new"))
        assert found["runs"].status == PROBLEM
        assert f"{tmp_path}/runs is a file" in found["runs"].value

    @pytest.mark.parametrize("refused", ["cache", "runs"])
    def test_a_folder_that_cannot_be_written(self, refused, tmp_path, monkeypatch):
        for name in ("cache", "runs"):
            (tmp_path / name).mkdir()
        original = folders.tempfile.TemporaryFile

        def temporary(*arguments, dir, **options):
            if dir == tmp_path / refused:
                raise OSError(errno.EROFS, "Read-only file system")
            return original(*arguments, dir=dir, **options)

        monkeypatch.setattr(folders.tempfile, "TemporaryFile", temporary)
        found = by_name(folders.folders(tmp_path / "runs"))
        assert found[refused].status == PROBLEM
        assert "cannot be written: Read-only file system" in found[refused].value
        assert sum(finding.status == PROBLEM for finding in found.values()) == 1
        assert any(name.endswith("speed") for name in found)  # of the other one

    def test_a_full_and_a_slow_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folders, "free_bytes", lambda path: folders.LEAST_FREE - 1)
        monkeypatch.setattr(folders, "SLOW", float("inf"))
        found = by_name(folders.folders(tmp_path / "runs"))
        assert (found["cache"].status, found["runs"].status) == (PROBLEM, PROBLEM)
        assert found["cache, speed"].status == NOTE

    def test_a_slow_disk_is_given_up(self, tmp_path, monkeypatch):
        synced = []  # each takes 0.6 seconds of a clock that stands still otherwise
        monkeypatch.setattr(os, "fsync", synced.append)
        monkeypatch.setattr(folders, "time", mock.Mock(perf_counter=lambda: 0.6 * len(synced)))
        monkeypatch.setattr(folders, "read_speed", lambda descriptor: 1.0)
        write, _ = folders.disk_speed(tmp_path)
        assert len(synced) == 2  # of four
        assert write == 2 * (1 << 18) / 1.2
