"""Does a drift budget hold, and what does it cost? ``python scripts/drift_budget.py --seeds 10``.

One domain (biomedicine) with a model that writes its own past. Of every seed: plain training, the anchor at a fixed λ,
the anchor with a budget, and the anchor with the drift of the fixed λ as its budget. Drift is the rise of the loss on
text that the base model wrote with another seed, and that nothing was trained on; gain is the fall of the loss on
held-out text of the domain. Every finished run is kept in ``--output`` and not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch

from das_lm import ContinualConfig, ContinualTrainer, Domain
from das_lm.files import write_json
from das_lm.measure.intervals import Estimate
from das_lm.methods.writing import Writer
from das_lm.model.loading import load_model, load_tokenizer, model_path
from das_lm.run.recipe import Recipe


def losses_of(trainer: ContinualTrainer, rows: datasets.Dataset) -> torch.Tensor:
    """The loss of each row, mean over its tokens, [rows]."""
    held_out = trainer.measure({"x": trainer.inputs.held_out(rows)})["x"]
    return torch.tensor(held_out.nats / held_out.tokens)


def run(args: argparse.Namespace, seed: int, **options: Any) -> dict[str, Any]:
    """Train once, and measure."""
    recipe = Recipe(args.model, [Domain("bio")], "unused", method="naive")
    path = model_path(recipe)
    model, tokenizer = load_model(path, recipe), load_tokenizer(path, recipe)
    bio = Domain("bio", args.data).load() if args.data else Domain("bio").load()
    method = options.pop("method", "anchor")
    with TemporaryDirectory() as scratch:
        config = ContinualConfig(
            output_dir=scratch,
            max_length=args.max_length,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=0.1,
            memory_size=args.rows,
            seed=seed,
            use_cpu=args.cpu,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10_000,
            **options,
        )
        remember = "self" if method != "naive" else None
        trainer = ContinualTrainer(
            model, config, method, bio.train, processing_class=tokenizer, domain="bio", remember=remember
        )
        fresh = Writer(trainer).rows(128, "fresh", seed)
        fresh = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in fresh])
        before = {name: losses_of(trainer, rows) for name, rows in (("fresh", fresh), ("bio", bio.held_out))}
        result = trainer.train()
        rise = losses_of(trainer, fresh) - before["fresh"]
        fall = before["bio"] - losses_of(trainer, bio.held_out)
        state = {key: value for one in trainer.methods for key, value in one.state().items()}
    half = 1.96 * float(rise.std()) / len(rise) ** 0.5
    return {
        "gain": float(fall.mean()),
        "drift": float(rise.mean()),
        "drift_interval": [float(rise.mean()) - half, float(rise.mean()) + half],
        "seconds": round(result.metrics["train_runtime"], 1),
        **{key: state[key] for key in ("divergence", "landed_at", "budget_holds") if key in state},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="built-in-causal")
    parser.add_argument("--data", help="text of the domain; the built-in one by default")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--compared", type=int, default=10, help="so many seeds make the runs without a budget, too")
    parser.add_argument("--budget", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("output/drift_budget"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        fixed: dict[str, Any] = {}
        names = ("plain", "λ 1", f"budget {args.budget:g}", "budget of λ 1")
        for name in names if seed < args.compared else names[2:3]:
            path = args.output / f"{name} {seed}.json"
            if not path.is_file():
                options: dict[str, Any] = {"method": "naive"} if name == "plain" else {}
                if name.startswith("budget"):
                    options = {"drift_budget": max(fixed["drift"], 1e-4) if "λ" in name else args.budget}
                write_json(path, run(args, seed, **options))
            one = json.loads(path.read_text(encoding="utf-8"))
            fixed = one if name == "λ 1" else fixed
            found.setdefault(name, []).append(one)
            low, high = one["drift_interval"]
            told = f"gain {one['gain']:.3f}  drift {one['drift']:+.4f} ({low:+.4f} to {high:+.4f})"
            print(f"seed {seed}  {name:16} {told}  {one.get('landed_at', '')}", flush=True)
    print(f"\n{'':16} {'gain':>15} {'drift':>17}")
    for name, runs in found.items():
        gain, drift = (Estimate.of([one[key] for one in runs]) for key in ("gain", "drift"))
        halves = [f" ± {one.half:.3f}" if one.half is not None else "" for one in (gain, drift)]
        print(f"{name:16} {gain.mean:>7.3f}{halves[0]:8} {drift.mean:>9.4f}{halves[1]:8}")
    runs = found[f"budget {args.budget:g}"]
    held = sum(one["drift_interval"][0] <= args.budget for one in runs)
    print(f"\nThe budget of {args.budget:g} holds within its interval in {held} of {len(runs)} seeds")


if __name__ == "__main__":
    main()
