"""Real processes beside this one."""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def run_in_two_processes(script: str, directory: Path, *arguments) -> None:
    """Run the text of a script in two gloo ranks of one thread each; one such pair at a time, on a machine of few
    cores."""
    path = directory / "script.py"
    path.write_text(
        f"import atexit\nfrom das_lm.run.processes import leave_group\natexit.register(leave_group)\n{script}"
    )
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    with open(Path(tempfile.gettempdir(), f"das-lm-tests-{os.getuid()}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(
            [*launcher, path, *arguments], env=environment, capture_output=True, text=True, timeout=600
        )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
