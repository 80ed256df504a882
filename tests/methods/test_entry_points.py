"""A package of a user's brings a method, which runs by its name, with its argument on the command line."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SHRINK = '''
"""Shrink: every weight loses a share of itself at the end of a domain."""

from dataclasses import dataclass

from das_lm.methods import Method, knob
from das_lm.methods.arguments import Arguments, Share


@dataclass
class ShrinkArguments(Arguments):
    shrink_share: Share = knob(0.1, "What every weight loses.")


class Shrink(Method):
    arguments = ShrinkArguments

    def finish_weights(self):
        for value in self.values().values():
            value.mul_(1 - self.args.shrink_share)
'''


def run_recipe(world: Path, tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    """The command line, where two packages bring methods: one of them does not import."""
    for name, code in (("shrink", SHRINK), ("gone", "import nowhere_to_be_found")):
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}_method-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-method\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[das_lm.methods]\n{name} = {name}:{name.capitalize()}\n")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "das_lm", "pretrain", "--recipe", str(world / "recipe.yaml"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)


def test_a_method_of_a_package_runs_by_its_name(world, tmp_path):
    options = ["--method", "shrink", "--shrink_share", "0.25", "--learning_rate", "0", "--output_dir", "out"]
    result = run_recipe(world, tmp_path, *options)
    assert result.returncode == 0, result.stderr
    base = load_file(world / "model" / "model.safetensors")
    for stage, share in (("1-bio", 0.75), ("2-cs", 0.75**2)):
        weights = load_file(tmp_path / "out" / stage / "model.safetensors")
        assert all(torch.allclose(weights[name], share * value) for name, value in base.items())


def test_its_arguments_are_checked_and_a_broken_one_is_told_when_it_is_used(world, tmp_path):
    for options, message in (
        (["--method", "shrink", "--shrink_share", "2"], "shrink_share: 2.0 must be between 0 and 1"),
        (
            ["--method", "gone"],
            "method 'gone', the entry point gone:Gone of the package gone-method, cannot be imported",
        ),
    ):
        result = run_recipe(world, tmp_path, *options, "--output_dir", "out")
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
        assert not (tmp_path / "out").exists()
