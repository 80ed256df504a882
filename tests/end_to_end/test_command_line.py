"""The command line as a person uses it: equivalent configurations in process, the rest through real processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from das_lm.cli import main
from das_lm.measure.results import Results
from tests.end_to_end.helpers import command
from tests.helpers import ROOT, run_recipe, save_model, step_losses, tiny_roberta


@pytest.fixture(scope="module")
def still(world, tmp_path_factory) -> str:
    """The model without dropout: nothing but the drops through the gates is random."""
    return str(save_model(tiny_roberta(dropout=0.0), tmp_path_factory.mktemp("still") / "model"))


EQUIVALENT = {
    "accumulation": (
        ["--contrast_weight", "0", "--per_device_train_batch_size", "16"],
        ["--contrast_weight", "0", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"],
    ),
    "checkpointing": ([], ["--activation_checkpointing", "true"]),
    "importance batches": ([], ["--importance_batch_size", "3"]),
    "evaluation in between": ([], ["--eval_strategy", "steps", "--eval_steps", "1"]),
    "data-loader workers": ([], ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true"]),
}


@pytest.mark.parametrize("case", EQUIVALENT)
def test_equivalent_configurations_have_one_loss_trajectory(world, still, tmp_path, case):
    common = ["--model_name_or_path", still, "--logging_steps", "1", "--max_steps", "4"]
    left, right = EQUIVALENT[case]
    for name, options in (("left", left), ("right", right)):
        assert run_recipe(world, tmp_path / name, *common, *options) == 0
    left, right = step_losses(tmp_path / "left"), step_losses(tmp_path / "right")
    assert len(left) == len(right) == 8
    residual = torch.tensor(left) - torch.tensor(right)
    assert residual.abs().max() < 2e-4 * max(left)
    assert residual.mean().abs() < 5e-5 * max(left)  # no drift to one side


def test_killed_run_resumes_to_the_same_result(world, tmp_path):
    """SIGKILL as soon as the second domain has its first whole checkpoint. Every run is a process of its own."""
    options = ["--max_steps", "8", "--save_steps", "2"]
    alike = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},  # sums in one order
    }
    subprocess.run(command(world, tmp_path / "whole", *options), **alike, check=True, timeout=300)
    output = tmp_path / "killed"
    process = subprocess.Popen(command(world, output, *options), **alike)
    waited_for = output / "2-cs.training" / "checkpoint-2" / "manifest.json"
    deadline = time.monotonic() + 120
    while not waited_for.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert waited_for.exists() and not (output / "2-cs").exists()

    subprocess.run(command(world, output, *options, "--resume"), **alike, check=True, timeout=300)
    for file in ("model.safetensors", "importance.safetensors"):
        for stage in ("1-bio", "2-cs"):
            left, right = load_file(tmp_path / "whole" / stage / file), load_file(output / stage / file)
            torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert (Results.load(tmp_path / "whole").matrix() == Results.load(output).matrix()).all()


def test_bad_input_through_a_real_process(world, tmp_path):
    result = subprocess.run(
        command(world, tmp_path / "run", "--learning_rat", "1"), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert "--learning_rate" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_readme_command_runs_the_whole_recipe(tmp_path):
    """The main job, as the README gives it, but for the output directory, and with a quarter of its steps."""
    readme = (ROOT / "README.md").read_text()
    pattern = r"^.*(accelerate launch scripts/continual_pretrain\.py --recipe bio_then_cs)$"
    command = re.search(pattern, readme, re.MULTILINE)[1]
    options = f"--output_dir {tmp_path / 'run'} --max_steps 100 --eval_steps 50"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # waiting threads spin otherwise, beside other tests
    result = subprocess.run(
        f"{command} {options}",
        shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    results = Results.load(tmp_path / "run")
    assert [stage["name"] for stage in results.stages] == ["base", "bio", "cs"]
    matrix, accuracy = results.matrix(), results.matrix("accuracy")  # [stages, (general, bio, cs)]
    assert matrix[1, 1] < matrix[0, 1] - 0.5 and matrix[2, 2] < matrix[1, 2] - 0.5  # both domains are learned
    assert accuracy[2, 0] > accuracy[0, 0] - 0.04  # and what was known is kept: plain training loses 0.18 here
    assert "forgetting rate" in result.stdout
    # What was seen on the way, and the page that shows it.
    for stage in results.stages[1:]:
        assert [entry["step"] for entry in stage["history"] if "held_out" in entry] == [50, 100]
    page = (tmp_path / "run" / "report.html").read_text()
    assert (
        page.rstrip().endswith("</html>") and page.count("<svg") == len(list(tmp_path.glob("run/figures/*.svg"))) > 5
    )
    assert list((tmp_path / "run" / "tensorboard" / "2-cs").glob("events.*"))
    assert set(results.intervals) == {"loss", "accuracy"} and results.integrated_loss().keys() == {"bio", "cs"}


def test_das_lm_and_the_script_take_the_same_options(world, tmp_path, capsys):
    assert main(["pretrain", "--recipe", str(world / "recipe.yaml"), "--print_recipe", "--max_steps", "7"]) == 0
    printed = capsys.readouterr().out
    result = subprocess.run(
        [sys.executable, "scripts/continual_pretrain.py", "--recipe", str(world / "recipe.yaml"), "--print_recipe",
         "--max_steps", "7"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert result.stdout == printed and "max_steps: 7" in printed
