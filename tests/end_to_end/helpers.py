"""Runs through the command line that are stopped, and go on."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, load_script, run_recipe


def command(world: Path, output: Path, *options: str) -> list[str]:
    """The main job of the README, on another recipe, as a process of its own."""
    script = ROOT / "scripts" / "continual_pretrain.py"
    return [sys.executable, str(script), "--recipe", str(world / "recipe.yaml"), "--output_dir", str(output), *options]


def finish(world: Path, output: Path, whole: Path, *options: str) -> None:
    """Let a run come to its end: weights, importance and scores are those of another, and so are the files."""
    resume = ["--resume"] if (output / "recipe.yaml").exists() else []
    assert run_recipe(world, output, *options, *resume) == 0
    assert load_script("chaos").differences(whole, output) == []


class Killed(BaseException):
    """Nothing in the package catches it."""


def stop_at(world: Path, output: Path, monkeypatch: Any, point: tuple[Any, str, int, str]) -> None:
    """Run until a point: object, function, its n-th call, and whether the run ends before or after that."""
    where, name, call, moment = point
    original, calls = getattr(where, name), []

    def stop(*arguments, **options):
        calls.append(name)
        if len(calls) == call and moment == "before":
            raise Killed
        result = original(*arguments, **options)
        if len(calls) == call:
            raise Killed
        return result

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(where, name, stop)
        run_recipe(world, output)
