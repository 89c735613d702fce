"""Identity of a process: host, number and job, and whether it has ended as far as this machine can tell."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
"""Where schedulers say which job a process belongs to."""


def identity() -> dict[str, Any]:
    """Host, process and job of this process, and what tells its number from the same one elsewhere or later."""
    job = next((os.environ[name] for name in _JOBS if os.environ.get(name)), None)
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "job": job,
        "machine": _machine(),
        "started": _started(pid),
    }


def has_ended(process: Mapping[str, Any]) -> bool:
    """Whether the process of an `identity` is known to have ended; never known of another machine's."""
    machine, started = process.get("machine"), process.get("started")
    if machine is None or started is None or machine != _machine():
        return False
    return _started(process["pid"]) != started


def describe(process: Mapping[str, Any]) -> str:
    """A few words for a message."""
    job = process.get("job")
    return f"process {process['pid']} on {process['host']}" + (f", job {job}" if job else "")


def _machine() -> str | None:
    """This boot of this machine and this container's process numbers; None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When the process was started, in the kernel's ticks; None where there is none, or only what is left of it."""
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]
