"""CPUs under control groups of both versions, as files that look like the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.runtime.cpus import usable_cpus

MANY = 64


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MANY)))


def cpus(tmp_path: Path, membership: str, files: dict[str, str]) -> int:
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "membership").write_text(membership)
    return usable_cpus(tmp_path / "cgroup", tmp_path / "membership")


@pytest.mark.parametrize(
    ("maximum", "expected"),
    [("max 100000", MANY), ("200000 100000", 2), ("150000 100000", 1), ("10000 100000", 1), ("9900000 100000", MANY)],
)
def test_the_quota_of_version_2_is_rounded_down_and_at_least_1(tmp_path: Path, maximum: str, expected: int) -> None:
    assert cpus(tmp_path, "0::/\n", {"cpu.max": f"{maximum}\n"}) == expected


def test_the_smallest_quota_of_the_groups_above_counts(tmp_path: Path) -> None:
    files = {
        "a/cpu.max": "300000 100000\n",
        "a/b/cpu.max": "max 100000\n",
        "a/b/c/cpu.max": "800000 100000\n",
        "other/cpu.max": "100000 100000\n",
    }
    assert cpus(tmp_path, "0::/a/b/c\n", files) == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", MANY), ("400000", 4)])
def test_version_1_has_a_file_for_quota_and_one_for_period(tmp_path: Path, quota: str, expected: int) -> None:
    membership = "5:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/\n"
    files = {"cpu,cpuacct/cpu.cfs_quota_us": f"{quota}\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}
    assert cpus(tmp_path, membership, files) == expected


def test_without_control_groups_the_affinity_mask_counts(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path / "none", tmp_path / "nothing") == MANY


def test_damaged_files_are_no_limit(tmp_path: Path) -> None:
    assert cpus(tmp_path, "0::/\n", {"cpu.max": "nonsense\n"}) == MANY
