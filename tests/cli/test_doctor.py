"""``clipfast doctor`` finds nothing wrong on a sound machine, and finds each planted problem."""

import json
import os
import resource
import subprocess
import sys
from unittest import mock

import pytest
import torch

from clipfast import run
from clipfast.data import index, open_shards, staging
from clipfast.doctor import dataset, machine
from clipfast.doctor.machine import NOTE, OK, PROBLEM, Finding

from ..small_runs import picture, run_command, sample, write_shard
from ..train.faults import PLACES, faults, faulty_samples
from .test_host import GIB, files


def by_name(found) -> dict[str, Finding]:
    """Return the findings of ``clipfast doctor`` by name; assert that each problem has a fix."""
    found = list(found)
    assert all(bool(finding.fix) == (finding.status != OK) for finding in found)
    return {finding.name.strip(): finding for finding in found}


class TestGPUs:
    """Checks of ``clipfast doctor`` on fake GPUs, and on machines without a GPU."""

    def test_gpus(self, monkeypatch):
        monkeypatch.setattr(machine, "try_kernel", lambda device: Finding("  Triton", "ran"))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * GIB, 80 * GIB))
        for capability, status in (((9, 0), OK), ((7, 5), NOTE)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            found = by_name(machine.gpus())
            assert found["cuda:0"].status == status
            assert "79.0 GiB of 80.0 GiB free" in found["cuda:0"].value

    @pytest.mark.parametrize(
        ("driver", "visible", "cuda", "status", "part"),
        [
            (False, None, None, NOTE, "no driver"),
            (True, "", None, NOTE, "CUDA_VISIBLE_DEVICES"),
            (True, None, None, PROBLEM, "built for CPUs"),
            (True, None, "12.8", PROBLEM, "CUDA 12.8"),
        ],
    )
    def test_none(self, driver, visible, cuda, status, part, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        files(tmp_path, {str(machine.DRIVER): "NVRM version"} if driver else {})
        (found,) = machine.gpus(tmp_path)
        assert found.status == status
        assert part in f"{found.value} {found.fix}"

    @pytest.mark.parametrize(
        ("ours", "status"),
        [
            (lambda x, bias: torch.nn.functional.gelu(x + bias), OK),
            (lambda x, bias: torch.nn.functional.gelu(x + 1.001 * bias), PROBLEM),
            (lambda x, bias: x * float("nan"), PROBLEM),
            (mock.Mock(side_effect=RuntimeError("no gcc\nthe rest")), PROBLEM),
        ],
        ids=["right", "wrong", "nan", "no compiler"],
    )
    def test_the_trial_of_a_kernel(self, ours, status, monkeypatch):
        def bias_gelu(x, bias, backend):
            """Compute GELU, by the function ``ours`` in place of the Triton kernel that ``clipfast doctor`` tries."""
            return ours(x, bias) if backend == "triton" else torch.nn.functional.gelu(x + bias)

        monkeypatch.setattr("clipfast.kernels.bias_gelu", bias_gelu)
        assert machine.try_kernel(torch.device("cpu")).status == status


class TestMachine:
    """Checks of ``clipfast doctor``: packages, limits, environment variables and folders of the machine."""

    def test_missing_packages(self, monkeypatch):
        original = machine.importlib.metadata.version

        def version(name):
            """Return the version of a package, as if Triton and tokenizers were not installed."""
            if name in ("triton", "tokenizers"):
                raise machine.importlib.metadata.PackageNotFoundError
            return original(name)

        assert PROBLEM not in {finding.status for finding in machine.packages()}
        monkeypatch.setattr(machine.importlib.metadata, "version", version)
        found = by_name(machine.packages())
        assert (found["triton"].status, found["triton"].fix[:20]) == (PROBLEM, "pip install 'triton>")
        assert (found["tokenizers"].status, found["tokenizers"].fix) == (NOTE, "pip install 'clipfast[siglip]'")

    def test_limits(self, monkeypatch):
        for soft, status in ((1023, PROBLEM), (1024, OK), (resource.RLIM_INFINITY, OK)):
            monkeypatch.setattr(resource, "getrlimit", lambda number, soft=soft: (soft, resource.RLIM_INFINITY))
            found = by_name(machine.host())
            assert found["open files"].status == status
            assert status != PROBLEM or found["open files"].fix == "ulimit -n 1024"

    def test_variables(self):
        set_ = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": "/x", "CLIPFAST_CACHE": "/x", "CLIPFAST_CASHE": "/x",
                "CUDA_VISIBLE_DEVICES": "0", "PATH": "/x"}  # fmt: skip
        assert {name: finding.status for name, finding in by_name(machine.variables(set_)).items()} == {
            "TRITON_INTERPRET": PROBLEM, "TRITON_CACHE_DIR": OK, "CLIPFAST_CACHE": OK, "CLIPFAST_CASHE": NOTE,
            "CUDA_VISIBLE_DEVICES": OK,
        }  # fmt: skip
        # clipfast doctor prints a table, so there is a finding even if no environment variable is set.
        assert [found.status for found in machine.variables({"PATH": "/x"})] == [OK]
        assert {run.VARIABLE, index.CACHE_VARIABLE, staging.MAX_BYTES_VARIABLE} <= set(machine.OURS)

    def test_folders(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
        assert {finding.status for finding in machine.folders(tmp_path / "runs")} == {OK}
        assert list(tmp_path.iterdir()) == []  # the check of folders leaves no file behind
        (tmp_path / "runs").touch()  # a file is in the place of the folder for runs
        found = by_name(machine.folders(tmp_path / "runs/new"))
        assert (found["cache"].status, found["runs"].status) == (OK, PROBLEM)
        monkeypatch.setattr(machine, "free_bytes", lambda path: machine.LEAST_FREE - 1)
        assert by_name(machine.folders(tmp_path / "other"))["runs"].status == PROBLEM

    def test_a_run_with_default_options(self, tmp_path, monkeypatch):
        (found,) = machine.default_run(tmp_path / "runs")
        assert found.status == OK
        monkeypatch.setattr("clipfast.train.preflight.available_memory", lambda: 2**20)
        (found,) = machine.default_run(tmp_path / "runs")
        assert (found.status, "--workers" in found.value) == (PROBLEM, True)
        assert list(tmp_path.iterdir()) == []

    def test_an_error_ends_one_look_only(self):
        def look():
            """Yield a finding of ``clipfast doctor``, then raise an error."""
            yield Finding("a", "b")
            raise OSError("broken")

        first, last = machine.looked(look)
        assert (first, last.status, last.value) == (Finding("a", "b"), PROBLEM, "OSError: broken")
        with pytest.raises(OSError, match="broken"):
            machine.looked(look, traceback=True)


class TestData:
    """Checks of ``clipfast doctor``: shards for training."""

    def look(self, pattern: object, **options: object) -> dict[str, Finding]:
        """Return the findings of ``clipfast doctor`` about the data set of this pattern, by name."""
        return by_name(dataset.dataset(str(pattern), options))

    def test_what_is_found(self, tmp_path):
        for name in "abcdefgh":
            write_shard(tmp_path / f"{name}.tar", [sample(number) for number in range(8)])
        found = self.look(tmp_path / "*.tar")
        assert found["shards"].value.startswith("8 file(s) of ")
        assert found["pairs"].value.startswith("16 of 16 that were tried are usable")
        assert (found["indexed"].status, found["indexed"].value) == (NOTE, "4 of 8 here, with 32 samples")
        open_shards([str(path) for path in tmp_path.glob("*.tar")])
        found = self.look(tmp_path / "*.tar")
        assert {finding.status for finding in found.values()} == {OK}

    def test_problems_and_notes(self, tmp_path):
        path = tmp_path / "a.tar"
        assert [(f.name, f.status) for f in dataset.dataset(str(path), {})] == [("shards", PROBLEM)]
        path.write_bytes(b"a photo")
        assert self.look(path)["pairs"].status == PROBLEM
        write_shard(path, [sample(number, png=b"x") for number in range(8)])
        found = self.look(path)["pairs"]
        assert (found.status, "first: a.tar/000" in found.value) == (PROBLEM, True)
        write_shard(path, [sample(0, png=b"x"), *(sample(number) for number in range(7))])
        found = self.look(path)["pairs"]
        assert (found.status, found.fix[:16]) == (NOTE, "first: a.tar/000")
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        assert self.look(path)["damaged"].status == NOTE

    def test_other_kinds_of_data(self, tmp_path):
        write_shard(tmp_path / "a.tar", [sample(number) for number in range(8)])
        # Shards from a command are not looked up one by one.
        found = self.look(f"pipe:cat {tmp_path}/a.tar #{{0..999}}")
        assert found["shards"].value == "1,000 elsewhere"
        assert (found["pairs"].status, "indexed" in found) == (OK, False)
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder/7.png").write_bytes(picture(7))
        (tmp_path / "folder/7.txt").write_text("seven")
        assert self.look(tmp_path / "folder")["shards"].value == "1 folder(s) of images here"
        (tmp_path / "folder/t.csv").write_text("view alt a,b,c\n7.png seven x\n")
        found = self.look(tmp_path / "folder/t.csv", image_key="view", text_key="alt", csv_separator=" ")
        assert (found["pairs"].status, found["indexed"].status) == (OK, OK)

    def test_every_pair_is_read_if_that_is_asked_for(self, tmp_path, monkeypatch):
        """Pairs that training would skip are counted and listed, and so are pairs that the shards have lost."""
        monkeypatch.setattr(dataset, "cores", lambda: 2)
        write_shard(tmp_path / "s.tar", faulty_samples())
        (tmp_path / "u.tar").write_bytes(b"no tar file")
        data = write_shard(tmp_path / "t.tar", [sample(number) for number in range(90)]).read_bytes()
        (tmp_path / "t.tar").write_bytes(data[: data.index(b"080.")])
        options = {"all": True, "list": tmp_path / "bad.tsv"}
        found = self.look(tmp_path / "{s,t}.tar", **options)["every pair"]
        listed = [line.split("\t") for line in (tmp_path / "bad.tsv").read_text().splitlines()]
        assert listed[0][:2] == ["t.tar", "damaged shard"]
        places = zip(PLACES, faults(), strict=True)
        bad = [(f"s.tar/{place:03d}", kind) for place, kind in places if kind not in ("no such field", "broken json")]
        assert [(name, kind) for name, kind, _ in listed[1:]] == bad  # the json of pairs is not read
        assert found.status == PROBLEM
        assert found.value.startswith("8 of 261 cannot be used: 1 x ")
        monkeypatch.setattr(dataset, "cores", lambda: 1)
        self.look(tmp_path / "{t,u}.tar", **options)
        assert (tmp_path / "bad.tsv").read_text().startswith("u.tar\tunreadable shard\t")
        write_shard(tmp_path / "a.tar", [sample(number) for number in range(15)])
        assert self.look(tmp_path / "a.tar", all=True)["every pair"] == Finding("every pair", "all 15 are usable")


class TestCommand:
    """The command ``clipfast doctor`` as a whole."""

    def test_this_machine(self, shards, capsys, tmp_path, monkeypatch):
        monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
        path = tmp_path / "d.json"
        code, out, error = run_command(capsys, "doctor", "--data", shards, "--logs", tmp_path, "--json", path)
        read = json.loads(path.read_text())
        assert error == ""
        assert all(f"\n{group}\n" in f"\n{out}" and found for group, found in read["groups"].items())
        findings = [finding for found in read["groups"].values() for finding in found]
        assert not {"failed", "missing"} & {finding["name"] for finding in findings}
        problems = sum(finding["status"] == PROBLEM for finding in findings)
        assert (read["problems"], code) == (problems, int(problems > 0))
        assert run_command(capsys, "doctor", "--all")[0] == 2

    def test_packages_are_missing(self, tmp_path):
        groups = {}
        for missing in ("torch", "braceexpand"):
            code = (
                f"import sys; sys.modules[{missing!r}] = None; from clipfast.cli.main import main; "
                "sys.exit(main(['doctor', '--overwrite', '--json', 'd.json', '--data', 'bundled:emoji/noto']))"
            )
            environment = os.environ | {"CLIPFAST_CACHE": str(tmp_path / "cache")}
            done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True)
            assert (done.returncode, done.stderr) == (1, b"")
            groups[missing] = json.loads((tmp_path / "d.json").read_text())["groups"]
            assert groups[missing]["data"][-1]["status"] == PROBLEM
        assert groups["torch"]["software"][-1]["value"] == "the rest needs torch, which is not there"
