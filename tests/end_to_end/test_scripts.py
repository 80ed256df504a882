"""What the scripts compute themselves: the numbers of the built-in models, the rows of the benchmark."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from das_lm.data.built_in import BASE_MODEL, CAUSAL_MODEL
from das_lm.measure.cloze import cloze_accuracy, load_questions
from tests.helpers import load_script

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "folder, architecture", [(BASE_MODEL, AutoModelForMaskedLM), (CAUSAL_MODEL, AutoModelForCausalLM)]
)
def test_the_readme_of_a_built_in_model_states_what_its_weights_give(folder, architecture):
    """It knows the facts of `general` when asked with new sentences, and neither bio's nor cs's."""
    build = load_script("build_base_model")
    model = architecture.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    table = [line.strip("| ").split(" | ") for line in (folder / "README.md").read_text().splitlines()]
    for domain, least, most in (("general", 0.75, 1.0), ("bio", 0.0, 0.25), ("cs", 0.0, 0.25)):
        row = next(row for row in table if row[0] == domain)
        right = cloze_accuracy(model, tokenizer, load_questions(f"built-in:{domain}")).accuracy
        assert least <= right <= most
        assert float(row[1].rstrip("%")) / 100 == pytest.approx(right, abs=0.011)  # two questions of 240
        assert float(row[-1]) == pytest.approx(build.held_out_loss(model, tokenizer, domain), abs=0.005)


@pytest.mark.parametrize("kind", [[], ["--causal"]], ids=["masked", "causal"])
def test_the_benchmark_times_every_configuration(kind, tmp_path, monkeypatch, capsys):
    """Each beside plain training of the same round, with its operations; the anchor beside `naive`, too."""
    benchmark, out = load_script("benchmark"), tmp_path / "out.json"
    small = {"rounds": 2, "batch_size": 2, "length": 16, "layers": 1, "vocabulary": 40}
    small = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(benchmark.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *small, *kind, "--json", str(out)])
    benchmark.main()
    results = json.loads(out.read_text())["results"]
    named = {"plain Trainer", *benchmark.CONFIGURATIONS, *(benchmark.CAUSAL_CONFIGURATIONS if kind else ())}
    assert named <= set(results) and len(results) == len(named) + 2  # two importance passes
    for one in results.values():
        quotients = [
            ours / plain for ours, plain in zip(one["seconds"], results["plain Trainer"]["seconds"], strict=True)
        ]
        assert one["of_plain"]["median"] == pytest.approx(sum(quotients) / 2)  # of two rounds
        assert one["of_plain"]["low"] <= one["of_plain"]["median"] <= one["of_plain"]["high"]
    assert results["DAS"]["operations_of_plain"] > 2 > results["soft masks only"]["operations_of_plain"]
    for name, naive in (("anchor, cached targets", "naive"), ("anchor, LoRA", "naive, LoRA")):
        quotients = [ours / its for ours, its in zip(results[name]["seconds"], results[naive]["seconds"], strict=True)]
        assert results[name]["of_naive"]["median"] == pytest.approx(sum(quotients) / 2)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--peak_of", "plain Trainer"])
    benchmark.main()
    assert int(capsys.readouterr().out.split()[-1]) > 2**20


def test_a_run_that_fails_ends_the_benchmark(monkeypatch):
    """What goes wrong in the thread of a configuration is raised where its step was asked for."""
    benchmark = load_script("benchmark")

    class Failing:
        add_callback = remove_callback = lambda self, callback: None

        def train(self):
            raise RuntimeError("no step")

    with pytest.raises(RuntimeError, match="no step"):
        benchmark.Stepper(Failing())


@pytest.mark.parametrize("what, lines", [("per_example", 3), ("text", 1)])
def test_the_other_benchmarks(what, lines, monkeypatch, capsys):
    benchmark = load_script("benchmark")
    monkeypatch.setattr(benchmark.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(benchmark, "MEGABYTES", 0.2)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", what, "--rounds", "1"])
    benchmark.main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines and ("loop / per example" if lines == 3 else "MB/s") in printed[-1]


@pytest.mark.parametrize(
    ("folder", "run", "words"),
    [
        ("", "self λ2 @7e-5", "by {} % of what plain training does at the same gain"),
        ("lora", "self λ2 @7e-4", "with LoRA by {} %"),
    ],
)
def test_the_published_runs_of_a_real_decoder_are_printed_and_drawn_again(
    folder, run, words, tmp_path, monkeypatch, capsys
):
    """Plain training's frontier, and what the anchor drifts beside it, as the README says on its first screen."""
    runs = tmp_path / "runs.json"
    shutil.copy(ROOT / "scripts" / "measured" / "smollm2" / folder / "runs.json", runs)
    monkeypatch.setattr(sys, "argv", ["gain_and_drift.py", "--kept", str(runs)])
    load_script("gain_and_drift").main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(run)]
    parts = [re.search(r"(\d+)% *$", row)[1] for row in rows]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Two commands")[0]
    assert words.format(parts[0]) in " ".join(readme.split())
    assert (tmp_path / "frontier.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
