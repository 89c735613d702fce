"""The SLURM script, with stand-ins for SLURM's two programs that start real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.recipes.small_runs import SMALL_OPTIONS, events

SCRIPT = ROOT / "recipes" / "bissl" / "slurm.sh"

# Two tasks, as srun starts them; the step's exit code is the largest of its tasks.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=0 ] && shift
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" 2>> {folder}/errors & pids+=($!)
done
echo "${{pids[@]}}" > {folder}/pids
worst=0
for pid in "${{pids[@]}}"; do
    wait "$pid"; code=$?
    [ $code -gt $worst ] && worst=$code
done
exit $worst
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1 && exit 0
echo "$@" >> {folder}/scontrol
"""
PYTHON = """#!/bin/bash
exec {python} "$@"
"""


def started(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tools / name).write_text(text.format(folder=folder, python=sys.executable))
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        # The script's port is 20000 and the rest of this by 10000.
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1]",
        "SLURM_NTASKS": "2",
    }
    arguments = [*SMALL_OPTIONS, *options, "--output-dir", str(folder / "run")]
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)


def wait_for_events(folder: Path, job: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 100
    while not (folder / "run" / "metrics.jsonl").exists() or len(events(folder / "run")) < 3:
        assert job.poll() is None, (folder / "errors").read_text()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGKILL, 137)])
def test_a_job_is_queued_again_where_it_can_go_on(number: signal.Signals, code: int, tmp_path: Path) -> None:
    job = started(tmp_path, "pretext", "--pretext.epochs=1000")
    wait_for_events(tmp_path, job)
    tasks = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    # SLURM signals every task; a node that dies takes its own away.
    for pid in tasks if number == signal.SIGUSR1 else tasks[1:]:
        os.kill(pid, number)
    assert job.wait(60) == code
    said = (tmp_path / "errors").read_text()
    if number == signal.SIGUSR1:
        assert "stopped by SIGUSR1, and saved" in said
    else:
        assert f"rank 1 (process {tasks[1]} on " in said
    assert (tmp_path / "scontrol").read_text().startswith("requeue ")


def test_a_finished_job_is_not(tmp_path: Path) -> None:
    job = started(tmp_path, "pretext")
    assert job.wait(100) == 0, (tmp_path / "errors").read_text()
    assert not (tmp_path / "scontrol").exists()
    assert list(tmp_path.glob("run/checkpoints/pretext-*/artifact.json"))
