"""Number of CPUs that this process may use: fewer than the machine has, in a container or under an affinity mask."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cpus(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Return the CPUs of the affinity mask, or the quota of the control group where it is lower; at least 1.

    A quota of 1.5 CPUs gives 1: two threads would be stopped for a quarter of every period.

    Args:
        cgroups: mount point of the control groups.
        membership: file that names the control group of this process.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _groups(cgroups, membership) if (quota := _quota(folder)) is not None]
    return max(1, min([cpus, *map(int, quotas)]))


def _groups(cgroups: Path, membership: Path) -> list[Path]:
    """Return the folders of this process's control group and of its ancestors: each may have a quota."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        # `0::/path` is version 2; `3:cpu,cpuacct:/path` is version 1, where each controller has its own mount.
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        group = root / path.lstrip("/")
        # In a container the path may be the host's, while the mount shows the container's own group as its root.
        folders += [group, *group.parents[: len(group.relative_to(root).parts)], root]
    return folders


def _quota(folder: Path) -> float | None:
    """Return the average number of CPUs that the group may use; null without a limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    try:
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except ValueError:  # "max"
        return None
