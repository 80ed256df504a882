"""What is gained and what is lost, and whether a drift budget holds: ``python scripts/gain_and_drift.py``.

One domain (biomedicine) with a model that writes its own past, causal. Of every seed: plain training over several
learning rates, the anchor on text of the model's own at a fixed λ, on foreign text, with a budget, and with what the
fixed λ drifts, on rows apart, as its budget. Drift is the rise of the loss on text that the base model wrote with
another seed, and that nothing was trained on; gain is the fall of the loss on held-out text of the domain; both in
nats per token. Every finished run is kept in ``--output`` and not made again; `runs.json` and `frontier.svg` there are
of all. ``--kept FILE`` trains nothing: it prints and draws what such a file holds.

The runs ``das …`` are the soft-masks of DAS alone (of the update, which Adam does not cancel), with importance from
dropout or from what the model writes; of the shuffled ones every layer's importances are dealt out to its units at
random, so that which unit is held back is chance.

A model of a GGUF file serves as well: ``--gguf FILE`` writes it to ``--model`` first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import peft
import torch
import transformers

from das_lm import ContinualConfig, ContinualTrainer, Domain
from das_lm.data.chats import chat_opening
from das_lm.files import write_json
from das_lm.measure.intervals import Estimate
from das_lm.methods import DAS, Anchor
from das_lm.methods.writing import Writer, facts_of, load_written, save_written
from das_lm.model.loading import load_model, load_tokenizer, model_path
from das_lm.randomness import permutation
from das_lm.report.drawing import drawing_style
from das_lm.report.figures import frontier
from das_lm.report.frontier import Frontier
from das_lm.run.recipe import Recipe
from das_lm.units.soft_mask import SoftMask

DAS_RUNS = ("das proxy", "das proxy shuffled", "das remembered", "das remembered shuffled")
RUNS = ("plain", "self", "foreign", "budget", "budget of self", *DAS_RUNS)
#: Kinds of runs, in figures.
WORDS = {
    "plain": "plain training",
    "self": "anchor on its own text",
    "foreign": "anchor on foreign text",
    "budget": "anchor, budget",
}
FRESH_SEED = 10_000  # of the text that drift is measured on


class Shuffled(DAS):
    """DAS, with the importances of every layer dealt out to its units at random."""

    def begin_domain(self) -> None:
        super().begin_domain()
        args, values = self.args, self.importance.values
        dealt = {key: one[permutation(len(one), args.seed, "dealt", key)] for key, one in values.items()}
        self.mask = SoftMask(self.units, dealt, args.soft_mask_target, args.soft_mask_units, args.soft_mask_strength)


class World:
    """A model, its text, and a domain, as the command line names them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.recipe = Recipe(args.model, [Domain("bio")], "unused", method="naive")
        self.path = model_path(self.recipe)
        self.tokenizer = load_tokenizer(self.path, self.recipe)
        self.bio = self.domain(args.data)
        self.held_out = self.bio.held_out.select(range(min(args.held_out, len(self.bio.held_out))))
        self.foreign = self.domain(args.foreign).train if args.foreign else None

    def domain(self, path: str | None) -> Any:
        return (Domain("bio", path) if path else Domain("bio")).load()

    def model(self) -> torch.nn.Module:
        model = load_model(self.path, self.recipe)
        if self.args.lora:
            lora = peft.LoraConfig(r=self.args.lora, lora_alpha=2 * self.args.lora, target_modules="all-linear")
            model = peft.get_peft_model(model, lora)
        return model

    def trainer(self, scratch: str, method: Any, learning_rate: float, seed: int, **given: Any) -> ContinualTrainer:
        args = self.args
        remember = given.pop("remember", None)
        torch.manual_seed(seed)  # of the adapter
        config = ContinualConfig(
            output_dir=scratch,
            max_length=args.max_length,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=learning_rate,
            warmup_steps=0.1,
            memory_size=args.rows,
            anchor_share=args.share,
            seed=seed,
            bf16=args.bf16,
            use_cpu=args.cpu,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10_000,
            **given,
        )
        return ContinualTrainer(
            self.model(),
            config,
            method,
            self.bio.train,
            processing_class=self.tokenizer,
            domain="bio",
            remember=remember,
        )

    def written(self, rows: int, seed: int) -> Path:
        """A file of text that the base model wrote."""
        path = self.args.output / f"written {seed}.safetensors"
        if not path.is_file():
            with TemporaryDirectory() as scratch:
                trainer = self.trainer(scratch, "naive", 1e-4, seed)
                text = Writer(trainer).rows(rows, "written")
                save_written(path, text, self.tokenizer, facts_of(trainer, "base"))
        return path

    def losses(self, trainer: ContinualTrainer) -> dict[str, torch.Tensor]:
        """The loss of each row that nothing is trained on, mean over its tokens, [rows]."""
        rows, _ = load_written(self.written(self.args.fresh, FRESH_SEED), self.tokenizer)
        fresh = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows])
        opening = chat_opening(self.tokenizer)[0]  # with which every row begins, and which nobody wrote
        data = {"fresh": fresh, "bio": self.held_out}
        if opening:
            data["opening"] = datasets.Dataset.from_list([{"input_ids": opening}])
        measured = trainer.measure({name: trainer.inputs.held_out(one) for name, one in data.items()})
        fresh_nats, fresh_tokens = measured["fresh"].nats, measured["fresh"].tokens
        if opening:
            fresh_nats = fresh_nats - measured["opening"].nats
            fresh_tokens = fresh_tokens - measured["opening"].tokens
        bio = measured["bio"]
        return {"fresh": torch.tensor(fresh_nats / fresh_tokens), "bio": torch.tensor(bio.nats / bio.tokens)}

    def run(self, method: Any, learning_rate: float, seed: int, **given: Any) -> dict[str, Any]:
        """Train once, and measure."""
        with TemporaryDirectory() as scratch:
            trainer = self.trainer(scratch, method, learning_rate, seed, **given)
            path = self.args.output / "base.json"
            if not path.is_file():
                write_json(path, {name: losses.tolist() for name, losses in self.losses(trainer).items()})
            before = json.loads(path.read_text(encoding="utf-8"))
            result = trainer.train()
            after = self.losses(trainer)
            state = {key: value for one in trainer.methods for key, value in one.state().items()}
            anchors = [one for one in trainer.methods if isinstance(one, Anchor)]
            apart = [float(one.divergence_apart(next(iter(one.base))).mean()) for one in anchors]  # as the budget does
        rise = after["fresh"] - torch.tensor(before["fresh"])
        fall = torch.tensor(before["bio"]) - after["bio"]
        half = 1.96 * float(rise.std()) / len(rise) ** 0.5
        return {
            "gain": float(fall.mean()),
            "drift": float(rise.mean()),
            "drift_interval": [float(rise.mean()) - half, float(rise.mean()) + half],
            **({"apart": apart[0]} if apart else {}),
            "seconds": round(result.metrics["train_runtime"], 1),
            **{key: state[key] for key in ("divergence", "landed_at", "budget_holds") if key in state},
        }

    def made(self, name: str, seed: int) -> dict[str, Any]:
        """The run of that name, from its file if it was made before."""
        args = self.args
        path = args.output / f"{name} {seed}.json"
        if not path.is_file():
            kind, rate = name.split(" @")
            kind, _, weight = kind.partition(" λ")
            given: dict[str, Any] = {"anchor_weight": float(weight or 1)}
            if kind in ("self", "budget", "budget of self"):
                given["remember"] = self.written(args.rows, seed)
            elif kind == "foreign":
                given["remember"] = self.foreign
            if kind == "budget":
                given["drift_budget"] = args.budget
            elif kind == "budget of self":
                given["drift_budget"] = max(self.made(f"self λ1 @{rate}", seed)["apart"], 1e-4)
            method: Any = "naive" if kind == "plain" else "anchor"
            if kind in DAS_RUNS:
                method = Shuffled() if kind.endswith("shuffled") else DAS()
                given = {"contrast_weight": 0.0, "soft_mask_target": "update", "importance": kind.split()[1]}
                given["remember"] = self.written(args.rows, seed)
            write_json(path, self.run(method, float(rate), seed, **given))
        return json.loads(path.read_text(encoding="utf-8"))


def convert(gguf: Path, directory: str) -> None:
    """Write the model of a GGUF file, which `transformers` reads with the package `gguf`, as it is usually saved."""
    names = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    del read.config.quantization_config
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(**names).save_pretrained(directory)


def told(found: dict[str, list[dict[str, Any]]], budget: float) -> None:
    """Print the mean of every run over its seeds, and its drift as a part of plain training's at the same gain."""
    means = {
        name: [Estimate.of([one[key] for one in runs]) for key in ("gain", "drift")] for name, runs in found.items()
    }
    plain = [(gain.mean, drift.mean) for name, (gain, drift) in means.items() if name.startswith("plain")]
    envelope, best = Frontier(plain) if plain else None, max((gain for gain, _ in plain), default=0.0)
    width = max(map(len, means), default=0)
    print(f"\n{'':{width}} seeds {'gain':>15} {'drift':>17}   of the best gain   of plain drift at equal gain")
    for name, (gain, drift) in means.items():
        halves = [f" ± {one.half:.3f}" if one.half is not None else "" for one in (gain, drift)]
        beside = ""
        if envelope and not name.startswith("plain"):
            of_plain = envelope.loss(gain.mean)
            ratio = f"{drift.mean / of_plain:.0%}" if of_plain else "no plain run"
            beside = f"{gain.mean / best:>16.0%}   {ratio:>28}"
        row = f"{name:{width}} {len(found[name]):>5} {gain.mean:>7.3f}{halves[0]:8} {drift.mean:>9.4f}{halves[1]:8}"
        print(f"{row}   {beside}")
    for name, runs in found.items():
        if name.startswith("budget") and "of self" not in name:
            held = sum(one["drift_interval"][0] <= budget for one in runs)
            print(f"\nThe budget of {budget:g} holds within its interval in {held} of {len(runs)} seeds")


def kept(output: Path) -> dict[str, list[dict[str, Any]]]:
    """The runs that are in a directory: name -> one of each seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(output.glob("*@* *.json")):
        found.setdefault(path.stem.rpartition(" ")[0], []).append(json.loads(path.read_text(encoding="utf-8")))
    return found


def draw(found: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Write `frontier.svg` (and `.png`): what each run loses against what it gains, mean and range over seeds."""
    curves: dict[str, dict[str, Any]] = {}
    for name, runs in sorted(found.items(), key=lambda item: not item[0].startswith("plain")):
        kind, _, rate = name.partition(" @")
        word, _, rest = kind.partition(" ")
        label = f"{WORDS.get(word, word)} {rest}".rstrip() + (f", learning rate {rate}" if kind != "plain" else "")
        curve = curves.setdefault(label, {"name": label, "x_label": "", "points": []})
        curve["x_label"] = "learning rate" if kind == "plain" else ""
        point: dict[str, Any] = {"value": float(rate), "forgetting": None}
        for key in ("gain", "drift"):
            values = [one[key] for one in runs]
            point |= {key: sum(values) / len(values), f"{key}_half": (max(values) - min(values)) / 2}
        curve["points"].append(point)
    for curve in curves.values():
        curve["points"].sort(key=lambda point: point["value"])
    with drawing_style():
        drawing = frontier(list(curves.values()), "nats per token", {})
    if drawing is not None:
        drawing.save(output, drawing.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="built-in-causal")
    parser.add_argument("--gguf", type=Path, help="a file that is converted to --model, unless that is there")
    parser.add_argument("--lora", type=int, default=0, help="rank of an adapter; 0: full weights")
    parser.add_argument("--data", help="text of the domain; the built-in one by default")
    parser.add_argument("--foreign", help="text that the base model never saw, for the run 'foreign'")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["plain", "self", "budget", "budget of self"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--compared", type=int, default=10, help="so many seeds make the runs without a budget, too")
    parser.add_argument("--budget", type=float, default=0.02)
    parser.add_argument("--weights", nargs="+", type=float, default=[1.0], help="λ of the runs without a budget")
    parser.add_argument("--share", type=float, default=0.25, help="remembered rows per row of the domain")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=512, help="that the model writes to remember")
    parser.add_argument("--fresh", type=int, default=128, help="rows that drift is measured on")
    parser.add_argument("--held_out", type=int, default=1000, help="documents that the gain is measured on, at most")
    parser.add_argument("--learning_rates", nargs="+", default=["1e-3"], help="of plain training")
    parser.add_argument("--learning_rate", default="1e-3", help="of the other runs")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("output/gain_and_drift"))
    parser.add_argument(
        "--kept", type=Path, metavar="FILE", help="a runs.json: its table and figure, without training"
    )
    args = parser.parse_args()
    if args.kept:
        found = json.loads(args.kept.read_text(encoding="utf-8"))
        told(found, args.budget)
        return draw(found, args.kept.parent)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.gguf and not Path(args.model).exists():
        convert(args.gguf, args.model)
    world = World(args)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        names = [f"plain @{rate}" for rate in args.learning_rates] if "plain" in args.runs else []
        for kind in args.runs:
            weights = [f" λ{weight:g}" for weight in args.weights] if kind in ("self", "foreign") else [""]
            names += [f"{kind}{weight} @{args.learning_rate}" for weight in weights if kind != "plain"]
        for name in names if seed < args.compared else [one for one in names if one.startswith("budget @")]:
            one = world.made(name, seed)
            found.setdefault(name, []).append(one)
            low, high = one["drift_interval"]
            words = f"gain {one['gain']:.3f}  drift {one['drift']:+.4f} ({low:+.4f} to {high:+.4f})"
            print(f"seed {seed}  {name:24} {words}  {one.get('landed_at', '')}", flush=True)
    told(found, args.budget)
    write_json(args.output / "runs.json", kept(args.output))
    draw(kept(args.output), args.output)


if __name__ == "__main__":
    main()
