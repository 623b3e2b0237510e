"""The memory available to a process, from the files of /proc and of control groups (cgroups)."""

from pathlib import Path

import pytest

from clipfast import host

GIB = 2**30
UNLIMITED_V1 = 2**63 - 4096


def files(root: Path, content: dict[str, object]) -> Path:
    """Write files of a fake /proc or /sys under ``root``, from which clipfast reads the machine's memory."""
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def meminfo(available: int) -> dict[str, object]:
    """Return the content of a fake /proc/meminfo with ``available`` bytes of memory."""
    return {"proc/meminfo": f"MemTotal: {2**36}kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB"}


V2 = {
    "proc/self/cgroup": "0::/a/b",
    "sys/fs/cgroup/a/memory.max": 8 * GIB,
    "sys/fs/cgroup/a/memory.current": 7 * GIB,
    "sys/fs/cgroup/a/memory.stat": f"anon 5\nfile 9\ninactive_file {GIB}\nactive_file {GIB}\nslab 7",
    "sys/fs/cgroup/a/b/memory.max": "max",
    "sys/fs/cgroup/a/b/memory.current": GIB,
}
V1 = {
    "proc/self/cgroup": "4:memory:/a/b\n1:name=systemd:/\n0::/",
    "sys/fs/cgroup/memory/a/memory.limit_in_bytes": 8 * GIB,
    "sys/fs/cgroup/memory/a/memory.usage_in_bytes": 7 * GIB,
    "sys/fs/cgroup/memory/a/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}",
    "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": UNLIMITED_V1,
    "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
}
CONTAINER = {  # a container sees its own cgroup as the root, whatever its name is
    "proc/self/cgroup": "4:memory:/docker/0123\n0::/",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": 8 * GIB,
    "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
}
TOP = {"proc/self/cgroup": "0::/"}


@pytest.mark.parametrize(
    ("machine", "cgroups", "available"),
    [
        (60 * GIB, V2, 3 * GIB),  # available: limit 8, minus 7 in use, plus 2 of file caches
        (60 * GIB, V1, 3 * GIB),
        (2 * GIB, CONTAINER, 2 * GIB),  # the machine has less memory available than the cgroup
        (60 * GIB, CONTAINER, 7 * GIB),
        (GIB, TOP, GIB),
        (GIB, TOP | {"sys/fs/cgroup/memory.max": ""}, GIB),
        (GIB, TOP | {"sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": 2 * GIB}, 0),
    ],
)
def test_available_memory(machine, cgroups, available, tmp_path):
    assert host.available_memory(files(tmp_path, meminfo(machine) | cgroups)) == available


def test_what_nothing_says(tmp_path):
    assert host.available_memory(tmp_path) is None
    assert host.free_bytes(tmp_path / "a/b/c") > 0
    assert host.nearest(tmp_path / "a/b/c") == tmp_path
