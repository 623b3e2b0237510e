"""What the files of a machine say that a process may have."""

from pathlib import Path

import pytest

from clipfast import host

GIB = 2**30


UNLIMITED_V1 = 2**63 - 4096


def files(root: Path, content: dict[str, object]) -> Path:
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def meminfo(total: int, available: int) -> dict[str, object]:
    return {"proc/meminfo": f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB"}


class TestHost:
    """The files that say what a process may have, in both versions of cgroups."""

    V2 = meminfo(64 * GIB, 60 * GIB) | {
        "proc/self/cgroup": "0::/a/b",
        "sys/fs/cgroup/a/memory.max": 8 * GIB,
        "sys/fs/cgroup/a/memory.current": 7 * GIB,
        "sys/fs/cgroup/a/memory.stat": f"anon 5\nfile 9\ninactive_file {GIB}\nactive_file {GIB}\nslab 7",
        "sys/fs/cgroup/a/b/memory.max": "max",
        "sys/fs/cgroup/a/b/memory.current": GIB,
        "sys/fs/cgroup/a/b/cpu.max": "150000 100000",
        "sys/fs/cgroup/a/cpu.max": "max 100000",
    }
    V1 = meminfo(64 * GIB, 60 * GIB) | {
        "proc/self/cgroup": "4:memory:/a/b\n3:cpu,cpuacct:/a\n1:name=systemd:/\n0::/",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": 8 * GIB,
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": 7 * GIB,
        "sys/fs/cgroup/memory/a/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}",
        "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": UNLIMITED_V1,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
        "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": 150000,
        "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": 100000,
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
    }

    @pytest.mark.parametrize("content", [V1, V2], ids=["v1", "v2"])
    def test_limits_of_cgroups_above(self, content, tmp_path):
        root = files(tmp_path, content)
        assert host.process_memory(root) == host.Memory(64 * GIB, 3 * GIB, 8 * GIB)  # 8 - 7 + 2 of file caches
        assert host.core_quota(root) == 1.5

    def test_a_container_sees_its_own_cgroup_at_the_top(self, tmp_path):
        root = files(
            tmp_path,
            meminfo(64 * GIB, 2 * GIB)
            | {
                "proc/self/cgroup": "4:memory:/docker/0123\n0::/",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 8 * GIB,
                "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
            },
        )
        assert host.process_memory(root) == host.Memory(
            64 * GIB, 2 * GIB, 8 * GIB
        )  # the machine has less than the cgroup

    def test_without_limits_or_files(self, tmp_path):
        assert host.process_memory(tmp_path) is None
        assert host.core_quota(tmp_path) is None
        root = files(tmp_path, meminfo(4 * GIB, GIB) | {"proc/self/cgroup": "0::/"})
        assert host.process_memory(root) == host.Memory(4 * GIB, GIB)
        unlimited = {
            "proc/self/cgroup": "4:memory:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
        }
        assert host.process_memory(files(tmp_path / "v1", meminfo(4 * GIB, GIB) | unlimited)).limit is None
        files(root, {"sys/fs/cgroup/cpu.max": "broken", "sys/fs/cgroup/memory.max": ""})
        assert host.process_memory(root) == host.Memory(4 * GIB, GIB)
        assert host.core_quota(root) is None

    def test_more_used_than_allowed_is_nothing_left(self, tmp_path):
        content = meminfo(4 * GIB, GIB) | {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": GIB}
        root = files(tmp_path, content | {"sys/fs/cgroup/memory.current": 2 * GIB})
        assert host.process_memory(root).available == 0

    def test_the_nearest_folder(self, tmp_path):
        assert host.nearest(tmp_path / "a/b/c") == tmp_path
        assert host.free_bytes(tmp_path / "a/b/c") > 0
