"""Two real processes: SIGTERM saves in both, one is killed and the other says so, and one alone goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from das_lm.files import broken_file
from tests.helpers import ROOT, run_recipe, save_model, step_losses, tiny_roberta


class Launched:
    """A run of two gloo ranks that torchrun has started."""

    def __init__(self, world: Path, output: Path, log: Path, *options: str):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [str(ROOT / "scripts" / "continual_pretrain.py"), "--recipe", str(world / "recipe.yaml")]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--output_dir", str(output), *options],
                env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, path: Path, timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while not path.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.002)

    def rank(self, number: int) -> int:
        """The process of a rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            if f"\0RANK={number}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                return int(child)
        raise AssertionError(f"there is no rank {number} among {children}")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_stopped_killed_and_continued_by_one_process(world, tmp_path, capsys):
    """Its losses are those of a run of one process: the same rows were in every step."""
    still = str(save_model(tiny_roberta(dropout=0.0), tmp_path / "model"))  # nothing is drawn per process
    common = ["--model_name_or_path", still, "--logging_steps", "1", "--max_steps", "4", "--save_steps", "1"]
    one = [*common, "--per_device_train_batch_size", "4"]
    two = [*common, "--per_device_train_batch_size", "2"]
    assert run_recipe(world, tmp_path / "whole", *one) == 0
    output = tmp_path / "run"

    run = Launched(world, output, tmp_path / "stopped.log", *two)
    run.wait_for(output / "1-bio.training" / "checkpoint-1" / "manifest.json")
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(60) != 0
    said = run.log.read_text()
    assert said.count("das-lm: interrupted; 'bio' is saved as ") == 1 and "--resume continues" in said, said[-3000:]
    newest = max(output.glob("1-bio.training/checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert broken_file(newest) is None and json.loads((newest / "batch.json").read_text())["processes"] == 2

    run = Launched(world, output, tmp_path / "killed.log", *two, "--resume")
    run.wait_for(output / "2-cs.training" / "checkpoint-1" / "manifest.json")
    os.kill(run.rank(1), signal.SIGKILL)
    killed = time.monotonic()
    assert run.process.wait(60) != 0
    said = run.log.read_text()
    assert "das-lm: error: process 0 of 2 lost another one" in said or "das-lm: interrupted" in said, said[-3000:]
    print(f"the other ended {time.monotonic() - killed:.1f} s later")

    assert run_recipe(world, output, *two, "--resume") == 2
    assert "began with 4 rows per update step (2 processes × 2 per_device" in capsys.readouterr().err
    assert run_recipe(world, output, *one, "--resume") == 0
    whole, continued = step_losses(tmp_path / "whole"), step_losses(output)
    assert len(whole) == 8 and continued == pytest.approx(whole, rel=1e-4)
