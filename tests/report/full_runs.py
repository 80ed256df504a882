"""Runs with everything that `forgetting.json` may hold, made up."""

import json
from pathlib import Path

import numpy as np

from das_lm.measure.results import Results

KINDS = ("head", "intermediate", "output")


def language_run(
    domains: list[str],
    layers: int = 2,
    heads: int = 4,
    bins: int = 8,
    finished: int | None = None,
    seed: int = 0,
    learning_rate: float = 1e-3,
    method: str = "das",
    steps: int = 100,
) -> Results:
    """A language model that learns `domains`, after `general`, which it never learns."""
    generator = np.random.default_rng(seed)
    columns = {"general": None, **{name: number for number, name in enumerate(domains, 1)}}
    speed = learning_rate / 1e-3
    losses = np.array([1.5, *np.linspace(6, 8, len(domains))])
    stages, known = [], []
    for number, stage_name in enumerate(["base", *domains][: 1 + (len(domains) if finished is None else finished)]):
        history = []
        if number:
            before, losses = losses, losses + 0.3 * speed
            losses[0] = before[0] + 0.15 * speed
            losses[number] = before[number] - 3 * speed
            for step in range(steps // 10, steps + 1, steps // 10):
                at = before + (losses - before) * (1 - np.exp(-4 * step / steps)) / (1 - np.exp(-4))
                contrast = 0.5 + 0.1 * generator.random()
                mlm = at[number] + 0.1 * generator.random()
                history.append(
                    {
                        "step": step,
                        "loss": mlm + contrast,
                        "loss_mlm": mlm,
                        "loss_contrast": contrast,
                        "learning_rate": learning_rate,
                        "grad_norm": 1.0,
                        "held_out": dict(zip(columns, at.tolist(), strict=True)),
                    }
                )
        stage = {
            "name": stage_name,
            "checkpoint": f"{number}-{stage_name}",
            "scores": {
                name: {
                    "loss": loss,
                    "accuracy": float(np.exp(-loss / 4)),
                    "tokens": 3740,
                    "documents": 450,
                    "bytes": 16000,
                    "loss_per_byte": loss * 3740 / 16000,
                }
                for name, loss in zip(columns, losses.tolist(), strict=True)
            },
            "intervals": {
                name: {"loss": [loss - 0.1, loss + 0.1], "accuracy": [0.2, 0.4]}
                for name, loss in zip(columns, losses.tolist(), strict=True)
            },
            "pseudo": {name: {"loss": 1.25, "tokens": 9000, "documents": 50} for name in columns},
            "cloze": {
                name: {
                    "accuracy": 0.3 + 0.05 * number,
                    "interval": [0.25 + 0.05 * number, 0.35 + 0.05 * number],
                    "chance": 0.25,
                    "right": 60,
                    "asked": 200,
                    "skipped": {"no blank": 3},
                    "candidates": 4.0,
                }
                for name in domains[:2]
            },
            "end_tasks": {
                f"{domains[0]}.topics": {
                    **{key: [0.6 + 0.02 * number, 0.65, 0.62] for key in ("accuracy", "macro_f1", "micro_f1")},
                    "seeds": [0, 1, 2],
                    "epochs": [3, 4, 3],
                    "train": 1000,
                    "dev": 100,
                    "test": 500,
                    "classes": ["a", "b", "c"],
                    "skipped": {"train: no label": 2},
                }
            },
        }
        if number:
            known = [*(known or ["general"]), stage_name]
            shapes = {"head": heads, "intermediate": bins, "output": bins}
            own = {
                kind: {
                    name: np.random.default_rng([index, at]).random((layers, width)) ** 2
                    for index, name in enumerate(known)
                }
                for at, (kind, width) in enumerate(shapes.items())
            }
            maps = {
                kind: {**parts, "accumulated": np.max(list(parts.values()), axis=0)} for kind, parts in own.items()
            }
            overlap = {
                kind: np.corrcoef([part.ravel() for part in parts.values()]).tolist() for kind, parts in own.items()
            }
            stage |= {
                "step": steps,
                "seconds": 140.2,
                "importance_of": known,
                "mean_importance": {kind: float(maps[kind]["accumulated"].mean()) for kind in KINDS},
                "history": history,
                "importance": {
                    "domains": known,
                    "maps": {k: {name: part.tolist() for name, part in parts.items()} for k, parts in maps.items()},
                    "overlap": overlap,
                },
            }
        stages.append(stage)
    results = Results(
        columns,
        json.loads(json.dumps(stages)),
        {
            "recipe": {
                "description": "A made-up run.",
                "model_name_or_path": "built-in",
                "domains": [{"name": name, "data": "built-in"} for name in domains],
                "method": [method],
                "schedule": "sequential",
                "output_dir": "out",
                "training": {"learning_rate": learning_rate, "seed": seed},
            },
            "versions": {"das_lm": "0.1.0", "torch": "2.13.0"},
            "device": "cpu",
            "processes": 1,
            "documents": {"general": 0, **dict.fromkeys(domains, 4500)},
            "warnings": {domains[0]: ["2 documents stand there twice"]},
        },
    )
    for measure, figures in results.summary().items():
        width = 0.02 if measure == "loss" else 0.3  # only losses stand out of the noise
        results.intervals[measure] = {
            name: [value - width, value + width] for name, value in figures.items() if value is not None
        }
    return results


def plain(results: Results) -> Results:
    """A run without all that may be absent: it is reported faster."""
    keep = ("name", "scores", "step", "seconds")
    results.stages = [{key: stage[key] for key in keep if key in stage} for stage in results.stages]
    results.intervals = {}
    return results


def small_run(measure: str = "accuracy", method: str = "ewc", seed: int = 0, epochs: int = 5) -> Results:
    """A small model that learns two tasks."""
    tasks = {"even": 1, "odd": 2}
    offset = 0.01 * seed

    def scores(even: float, odd: float) -> dict:
        return {
            task: {"loss": 2 - 2 * value, measure: value + offset, "tokens": 180, "documents": 180}
            for task, value in zip(tasks, (even, odd), strict=True)
        }

    final = [(0.95, 0.2), (0.8, 0.93)]  # after each stage
    stages = [{"name": "base", "scores": scores(0.1, 0.1)}]
    for name, (even, odd) in zip(tasks, final, strict=True):
        ramp = np.linspace(0.5, 1, epochs)
        curve = [{"even": even * part + offset, "odd": odd * part + offset} for part in ramp.tolist()]
        stages.append({"name": name, "scores": scores(even, odd), "curve": curve, "seconds": 1.0})
    run = {
        "experiment": "odd_even",
        "method": method,
        "seed": seed,
        "parameters": {},
        "options": {},
        "schedule": "sequential",
        "epochs": None,
        "split": "test",
        "measure": measure,
        "description": "even digits, then odd ones",
        "versions": {"das_lm": "0.1.0"},
    }
    if measure == "r2":
        inputs = np.linspace(-1, 1, 9).tolist()
        run |= {"inputs": inputs, "targets": [value**2 for value in inputs]}
        for number, stage in enumerate(stages):
            stage["predictions"] = [value**2 + 0.3 - 0.1 * number for value in inputs]
    return Results(tasks, stages, run, "nats" if measure == "accuracy" else "squared error")


def save(results: Results, directory: Path) -> Path:
    """Write it, and give the directory."""
    directory.mkdir(parents=True)
    results.save(directory)
    return directory
