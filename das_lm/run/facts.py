"""What a run tells of itself: its machine and text, and how each of its stages was learned."""

from __future__ import annotations

import json
import platform
import re
from typing import TYPE_CHECKING, Any

import accelerate
import datasets
import peft
import torch
import transformers
import yaml

from das_lm import __version__
from das_lm.errors import UserError
from das_lm.run.directory import Stage
from das_lm.training.checkpoints import STATE_NAME
from das_lm.training.trainer import ContinualTrainer
from das_lm.units.importance import FILE_NAME as IMPORTANCE_NAME
from das_lm.units.importance import Importance

if TYPE_CHECKING:
    from das_lm.data.domains import Documents
    from das_lm.run.recipe import Recipe


def run_facts(recipe: Recipe, text: dict[str, Documents], args: Any) -> dict[str, Any]:
    """What `forgetting.json` says of how a run was begun."""
    return {
        "recipe": yaml.safe_load(recipe.to_yaml()),
        **machine_facts(),
        **({"device": "cpu"} if args.device.type == "cpu" else {}),
        "precision": args.precision,
        "processes": args.world_size,
        "text": {name: one.fingerprints for name, one in text.items()},
        "documents": {n: len(d.train) if d.has_length else None if d.train else 0 for n, d in text.items()},
        "parts": {name: dict(d.parts) for name, d in text.items() if d.parts},
        "warnings": {name: d.warnings for name, d in text.items() if d.warnings},
    }


def machine_facts() -> dict[str, Any]:
    """Versions and device."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets, accelerate, peft)}
    return {
        "versions": {"das_lm": __version__, **versions, "python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def stage_facts(stage: Stage, trainer: ContinualTrainer) -> dict[str, Any]:
    """How a finished domain was learned: from what is saved with it, so that a resumed walk says the same."""
    state = json.loads((stage.directory / STATE_NAME).read_text(encoding="utf-8"))
    log = json.loads((stage.directory / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    facts = {**state, "history": history(log)}
    if (stage.directory / IMPORTANCE_NAME).is_file():
        facts["importance"] = Importance.load(stage.directory, trainer.units).maps()
    return facts


def history(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Trainer's log as a curve: one entry per step, with the held-out loss of every domain under `held_out`."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in log:
        row = steps.setdefault(entry["step"], {"step": entry["step"]})
        for key, value in entry.items():
            if match := re.fullmatch(r"eval_(.+)_loss", key):
                row.setdefault("held_out", {})[match[1]] = value
            elif key in ("loss", "learning_rate", "grad_norm") or key.startswith(("loss_", "budget_")):
                row[key] = value
    return [row for _, row in sorted(steps.items()) if len(row) > 1]


def check_text(before: dict[str, Any], now: dict[str, Any], option: str) -> None:
    """Whether a run goes on with the text that it began with: the facts of both, and the option that asks for it."""
    for name, parts in now["text"].items():
        for part, digest in parts.items():
            then: Any = before
            for key in ("text", name, part):  # an older release wrote none
                then = then.get(key) if isinstance(then, dict) else None
            if then not in (None, digest):
                raise UserError(
                    f"{option}: the {part} text of domain '{name}' is not what the run began with; put it back, or "
                    "start a new run"
                )


def check_precision(before: dict[str, Any], now: dict[str, Any], what: str) -> None:
    """Whether numbers are rounded as `forgetting.json` tells that they were; an older release does not tell."""
    if before.get("precision") not in (None, now["precision"]):
        was, is_now = (", ".join(f"{k} {v}" for k, v in run["precision"].items()) for run in (before, now))
        raise UserError(
            f"{what}: the precision was {was}, and would be {is_now}: set ACCELERATE_MIXED_PRECISION and what else of "
            "the kind stands in the environment as it was, or begin a new run in another --output_dir"
        )
