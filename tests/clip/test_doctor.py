"""What ``clipfast doctor`` finds: nothing wrong where nothing is, and each problem where it is made."""

import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from clipfast.doctor import dataset, folders, gpus
from clipfast.doctor.findings import NOTE, OK, PROBLEM, Finding, looked

from .conftest import picture, run_command, sample, write_shard
from .faults import PLACES, faults, faulty_samples
from .test_host import GIB, files

GROUPS = [
    "software", "GPUs", "processors", "memory", "limits", "folders", "optional packages", "environment", "data",
]  # fmt: skip


def by_name(found) -> dict[str, Finding]:
    found = list(found)
    assert all(bool(finding.fix) == (finding.status != OK) for finding in found)
    return {finding.name.strip(): finding for finding in found}


class FakeNVML:
    """As much of NVML as is asked for, of a healthy GPU unless ``changes`` say otherwise; None is not supported."""

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 0

    class NVMLError(Exception):
        pass

    def __init__(self, **changes: object) -> None:
        self.values = {
            "SystemGetDriverVersion": "580.1", "DeviceGetEnforcedPowerLimit": 700_000,
            "DeviceGetPowerManagementDefaultLimit": 700_000, "DeviceGetPersistenceMode": 1,
            "DeviceGetEccMode": (1, 1), "DeviceGetTotalEccErrors": 0,
        } | changes  # fmt: skip

    def __getattr__(self, name: str):
        value = self.values[name.removeprefix("nvml")]

        def call(*_: object) -> object:
            if value is None:
                raise self.NVMLError("Not Supported")
            return value

        return call


class TestGPUs:
    """GPUs that this machine need not have."""

    @pytest.fixture
    def card(self, monkeypatch):
        """One H100 with 79 of its 80 GiB free, on which kernels run as on the CPU."""
        for name, value in {
            "is_available": True, "device_count": 1, "get_device_capability": (9, 0), "get_device_name": "NVIDIA H100",
            "mem_get_info": (79 * GIB, 80 * GIB),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(gpus, "_kernel", lambda device: Finding("  Triton", "ran"))
        monkeypatch.setattr(gpus, "nvml_card", lambda device: (FakeNVML(), object()))
        return monkeypatch

    def test_a_healthy_one(self, card):
        found = by_name(gpus.gpus())
        assert {finding.status for finding in found.values()} == {OK}
        assert found["cuda:0"].value == "NVIDIA H100, compute capability 9.0"
        assert found["memory"].value == "79.0 GiB of 80.0 GiB free"
        assert (found["driver"].value, found["persistence"].value) == ("580.1", "on")
        assert found["power"].value == "limited to 700 W, by default 700 W"

    @pytest.mark.parametrize(
        ("changes", "name", "status"),
        [
            ({"DeviceGetEnforcedPowerLimit": 350_000}, "power", NOTE),
            ({"DeviceGetPersistenceMode": 0}, "persistence", NOTE),
            ({"DeviceGetEccMode": (0, 0)}, "ECC", NOTE),
            ({"DeviceGetTotalEccErrors": 2}, "ECC", PROBLEM),
        ],
    )
    def test_what_the_driver_says(self, changes, name, status, card):
        card.setattr(gpus, "nvml_card", lambda device: (FakeNVML(**changes), object()))
        found = by_name(gpus.gpus())
        assert found[name].status == status
        assert sum(finding.status != OK for finding in found.values()) == 1

    def test_what_the_driver_does_not_know_is_left_out(self, card):
        card.setattr(gpus, "nvml_card", lambda device: (FakeNVML(DeviceGetEccMode=None), object()))
        found = by_name(gpus.gpus())
        assert "ECC" not in found
        assert "persistence" in found

    def test_without_nvml(self, card):
        card.setattr(gpus, "nvml_card", mock.Mock(side_effect=ImportError("no pynvml", name="pynvml")))
        assert by_name(gpus.gpus())["driver"].fix == "pip install 'clipfast[bench]'"
        card.setattr(gpus, "nvml_card", mock.Mock(side_effect=RuntimeError("hidden")))
        found = by_name(gpus.gpus())
        assert (found["driver"].fix, found["Triton"].status) == ("NVML does not tell: hidden", OK)

    def test_an_old_and_busy_one(self, card):
        card.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        card.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 16 * GIB))
        found = by_name(gpus.gpus())
        assert (found["cuda:0"].status, found["memory"].status) == (NOTE, NOTE)

    @pytest.mark.parametrize(
        ("driver", "visible", "cuda", "status", "part"),
        [
            (False, None, None, NOTE, "there is no driver"),
            (True, "", None, NOTE, "CUDA_VISIBLE_DEVICES hides them"),
            (True, None, None, PROBLEM, "this PyTorch is built for CPUs"),
            (True, None, "12.8", PROBLEM, "new enough for CUDA 12.8"),
        ],
    )
    def test_none(self, driver, visible, cuda, status, part, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        files(tmp_path, {str(gpus.DRIVER): "NVRM version"} if driver else {})
        (found,) = gpus.gpus(tmp_path)
        assert found.status == status
        assert part in f"{found.value} {found.fix}"

    @pytest.mark.parametrize(
        ("ours", "status", "part"),
        [
            (lambda x, bias: torch.nn.functional.gelu(x + bias), OK, "off by"),
            (lambda x, bias: torch.nn.functional.gelu(x + 1.001 * bias), PROBLEM, "clipfast verify --op bias_gelu"),
            (lambda x, bias: x * float("nan"), PROBLEM, "off by nan"),
            (mock.Mock(side_effect=RuntimeError("no gcc\nthe rest")), PROBLEM, "cannot run a kernel: no gcc ("),
        ],
        ids=["right", "wrong", "nan", "no compiler"],
    )
    def test_the_trial_of_a_kernel(self, ours, status, part, monkeypatch):
        def bias_gelu(x, bias, backend):
            return ours(x, bias) if backend == "triton" else torch.nn.functional.gelu(x + bias)

        monkeypatch.setattr("clipfast.kernels.bias_gelu", bias_gelu)
        found = gpus._kernel(torch.device("cpu"))
        assert found.status == status
        assert part in f"{found.value} ({found.fix})"


class TestData:
    """Shards that are to be trained on."""

    @pytest.fixture(autouse=True)
    def fast(self, monkeypatch):
        monkeypatch.setattr(dataset, "SLOW", 0)

    def look(self, pattern: object, **options: object) -> dict[str, Finding]:
        return by_name(dataset.dataset(str(pattern), options))

    def test_what_is_found(self, tmp_path):
        write_shard(tmp_path / "a.tar", [sample(number) for number in range(8)])
        write_shard(tmp_path / "b.tar", [sample(number) for number in range(3)])
        found = self.look(tmp_path / "{a,b}.tar")
        assert found["shards"].value.startswith("2 file(s) of ")
        assert found["pairs"].value.startswith("4 of 4 that were tried are usable, ")
        assert (found["indexed"].status, found["indexed"].value) == (NOTE, "1 of 2 here, with 8 samples")
        assert found["read"].value.startswith("b.tar at ")
        from clipfast.data import open_shards

        open_shards([str(tmp_path / "b.tar")])
        found = self.look(tmp_path / "{a,b}.tar")
        assert (found["indexed"].status, found["indexed"].value) == (OK, "2 of 2 here, with 11 samples")
        assert {finding.status for finding in found.values()} == {OK}

    def test_problems(self, tmp_path):
        assert [(f.name, f.status) for f in dataset.dataset(f"{tmp_path}/a.tar", {})] == [("shards", PROBLEM)]
        (tmp_path / "a.tar").write_bytes(b"a photo")
        assert "not a tar file" in self.look(tmp_path / "a.tar")["pairs"].value
        write_shard(tmp_path / "a.tar", [sample(number, png=b"x") for number in range(8)])
        found = self.look(tmp_path / "a.tar")
        assert found["pairs"].status == PROBLEM
        assert "(4 x not an image); first: a.tar/000" in found["pairs"].value
        write_shard(tmp_path / "a.tar", [])
        assert self.look(tmp_path / "a.tar")["pairs"].status == PROBLEM

    def test_notes(self, tmp_path):
        write_shard(tmp_path / "a.tar", [sample(0, png=b"x"), *(sample(number) for number in range(7))])
        found = self.look(tmp_path / "a.tar")
        assert (found["pairs"].status, found["pairs"].fix[:20]) == (NOTE, "first: a.tar/000: no")
        with (tmp_path / "a.tar").open("r+b") as file:
            file.truncate((tmp_path / "a.tar").stat().st_size // 2)
        assert self.look(tmp_path / "a.tar")["damaged"].status == NOTE

    def test_shards_elsewhere_are_not_asked_one_by_one(self, tmp_path):
        write_shard(tmp_path / "a.tar", [sample(number) for number in range(8)])
        found = self.look(f"pipe:cat {tmp_path}/a.tar #{{0..999}}")
        assert found["shards"].value == "1,000 elsewhere"
        assert found["pairs"].status == OK
        assert "indexed" not in found

    def test_folders_and_synthetic_pairs(self, tmp_path):
        (tmp_path / "7.png").write_bytes(picture(7))
        (tmp_path / "7.txt").write_text("seven")
        found = self.look(tmp_path)
        assert found["shards"].value == "1 folder(s) of images here"
        assert (found["indexed"].status, found["indexed"].value) == (OK, "1 of 1 here, with 1 samples")
        assert found["pairs"].value.startswith("1 of 1 that were tried are usable, ")
        found = self.look("synthetic:8::synthetic:8@1")
        assert found["shards"].value == "2 set(s) of synthetic pairs"
        assert found.keys() == {"shards", "pairs"}

    def test_pairs_are_read_as_flags_say(self, tmp_path):
        (tmp_path / "7.png").write_bytes(picture(7))
        (tmp_path / "t.csv").write_text("view alt a,b,c\n7.png seven x\n")
        assert self.look(tmp_path / "t.csv")["pairs"].status == PROBLEM
        found = self.look(tmp_path / "t.csv", image_key="view", text_key="alt", csv_separator=" ")
        assert (found["pairs"].status, found["indexed"].status) == (OK, OK)

    def test_a_table_without_rows(self, tmp_path):
        (tmp_path / "t.csv").write_text("filepath,title\n")
        assert "it is empty: no row stands below its header" in self.look(tmp_path / "t.csv")["pairs"].value

    @pytest.mark.parametrize("cores", [1, 2])
    def test_every_pair_is_read_if_that_is_asked_for(self, cores, tmp_path, monkeypatch):
        """The pairs that training would leave out are counted and listed, and so is what the shards have lost."""
        monkeypatch.setattr(dataset, "cores", lambda: cores)
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
        assert [(name, kind) for name, kind, _ in listed[1:]] == bad  # the json of the others is not looked at
        assert found.status == PROBLEM
        assert found.value.startswith("8 of 261 cannot be used: 1 x ")
        self.look(tmp_path / "{s,t,u}.tar", **options)
        assert (tmp_path / "bad.tsv").read_text().startswith("u.tar\tunreadable shard\t")
        write_shard(tmp_path / "a.tar", [sample(number) for number in range(150)])
        assert self.look(tmp_path / "a.tar", all=True)["every pair"] == Finding("every pair", "all 150 are usable")

    def test_only_large_files_can_be_slow(self, tmp_path, monkeypatch):
        monkeypatch.setattr(dataset, "SLOW", float("inf"))
        write_shard(tmp_path / "a.tar", [sample(number) for number in range(8)])
        assert self.look(tmp_path / "a.tar")["read"].status == OK
        with (tmp_path / "a.tar").open("r+b") as file:
            file.truncate(dataset.CHUNK)
        assert self.look(tmp_path / "a.tar")["read"].status == NOTE


class TestCommand:
    """The command as a whole."""

    @pytest.fixture
    def found(self, monkeypatch):
        """What each group finds, in place of this machine."""
        found = {"software": [Finding("torch", "2.13")], "GPUs": [Finding("GPU", "none", NOTE, "buy one")]}
        looks = {group: (lambda group=group: found[group]) for group in found}
        monkeypatch.setattr("clipfast.doctor.command.looks", lambda *_: looks)
        return found

    def test_table_json_and_exit_code(self, found, capsys, tmp_path):
        code, out, err = run_command(capsys, "doctor", "--json", tmp_path / "d.json")
        assert (code, err) == (0, "")
        assert out == (
            "software\n  ok  torch  2.13\n\n"
            "GPUs\n  note  GPU  none\n             -> buy one\n\n"
            "0 problem(s), 1 note(s)\n"
        )
        read = json.loads((tmp_path / "d.json").read_text())
        assert (read["problems"], read["notes"], list(read["groups"])) == (0, 1, ["software", "GPUs"])
        assert read["groups"]["GPUs"] == [{"name": "GPU", "value": "none", "status": "note", "fix": "buy one"}]
        found["software"].append(Finding("triton", "not installed", PROBLEM, "pip install triton"))
        code, out, _ = run_command(capsys, "doctor", "--json", tmp_path / "d.json", "--overwrite")
        assert code == 1
        assert "  problem  triton  not installed\n                   -> pip install triton\n" in out
        assert json.loads((tmp_path / "d.json").read_text())["problems"] == 1

    def test_bad_arguments(self, found, capsys, tmp_path):
        code, out, err = run_command(capsys, "doctor", "--json", tmp_path / "none/d.json")
        assert (code, out) == (2, "")
        assert f"no folder {tmp_path}/none to write d.json in" in err
        assert run_command(capsys, "doctor", "--fodler", "x")[0] == 2

    def test_an_error_ends_one_look_only(self):
        def look(error):
            yield Finding("a", "b")
            raise error

        first, last = looked(lambda: look(ImportError("No module named 'x'", name="x")))
        assert (first, last.status, last.value) == (Finding("a", "b"), PROBLEM, "the rest needs x, which is not there")
        (_, last) = looked(lambda: look(OSError("broken")))
        assert (last.status, last.value) == (PROBLEM, "OSError: broken")
        with pytest.raises(OSError, match="broken"):
            looked(lambda: look(OSError("broken")), traceback=True)

    def test_this_machine(self, shards, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr(folders, "TRIED", 1 << 20)
        monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
        path = tmp_path / "d.json"
        code, out, _ = run_command(capsys, "doctor", "--data", shards, "--folder", tmp_path, "--json", path)
        groups = json.loads(path.read_text())["groups"]
        assert list(groups) == GROUPS
        assert all(groups.values())
        assert not any(finding["name"] in ("failed", "missing") for found in groups.values() for finding in found)
        packages = [finding["name"] for finding in groups["optional packages"]]
        assert len(packages) == len(set(packages))
        assert code == any(finding["status"] == PROBLEM for found in groups.values() for finding in found)
        assert [line for line in out.splitlines() if line in GROUPS] == GROUPS

    @pytest.mark.parametrize(
        "missing", [["torch"], ["pynvml", "braceexpand", "tqdm", "torchvision", "tokenizers", "PIL"]]
    )
    def test_packages_are_missing(self, missing, tmp_path):
        code = (
            f"import sys; sys.modules.update(dict.fromkeys({missing})); from clipfast.cli import main; "
            "sys.exit(main(['doctor', '--json', 'd.json', '--data', 'bundled:emoji/noto']))"
        )
        environment = os.environ | {"CLIPFAST_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (1, "")
        groups = json.loads((tmp_path / "d.json").read_text())["groups"]
        assert list(groups) == GROUPS
        assert {finding["status"] for finding in groups["limits"]} <= {OK, NOTE, PROBLEM}
        assert [finding["name"] for finding in groups["data"]][-1] in ("missing", "pairs", "read")
        if missing == ["torch"]:
            assert groups["software"][-1]["value"] == "the rest needs torch, which is not there"
