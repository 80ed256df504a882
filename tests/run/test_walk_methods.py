"""Every method through the walk over domains: state travels from stage to stage and through an interruption."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from das_lm import continual_pretrain, load_recipe
from das_lm.measure.results import Results
from das_lm.methods import METHODS
from das_lm.training.trainer import ContinualTrainer
from tests.helpers import run_recipe

OPTIONS = {
    "anchor": ["--memory_size", "16", "--self_replay_sweeps", "1"],
    "gem": ["--memory_size", "4"],
    "ncl": ["--optim", "sgd", "--max_grad_norm", "0"],
    "scp": ["--scp_projections", "2"],
    "self_replay": ["--memory_size", "8", "--self_replay_sweeps", "1", "--self_replay_target", "distributions"],
}
OPTIONS["replay self_replay"] = OPTIONS["self_replay"]
WEIGHTS = "model.safetensors"


def weights_of(stage) -> dict[str, torch.Tensor]:
    return load_file(stage / WEIGHTS)


@pytest.mark.parametrize("methods", [*METHODS, "das replay", "ewc interpolate", "replay self_replay"])
def test_an_interrupted_walk_ends_as_an_uninterrupted_one(world, tmp_path, methods, monkeypatch):
    """Interrupted in the second domain, after its first checkpoint."""
    options = ["--method", *methods.split(), *OPTIONS.get(methods, []), "--replay_ratio", "0.5"]
    assert run_recipe(world, tmp_path / "whole", *options) == 0

    class Interrupted(Exception):
        pass

    original = ContinualTrainer.training_step

    def interrupt(self, *args, **kwargs):
        if self.domain == "cs" and self.state.global_step == 3:
            raise Interrupted
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ContinualTrainer, "training_step", interrupt)
        run_recipe(world, tmp_path / "stopped", *options)
    assert run_recipe(world, tmp_path / "stopped", *options, "--resume") == 0
    for stage in ("1-bio", "2-cs"):
        whole, stopped = (tmp_path / run / stage for run in ("whole", "stopped"))
        files = sorted(path.name for path in whole.glob("*.safetensors"))
        assert files == sorted(path.name for path in stopped.glob("*.safetensors"))
        for file in files:
            ours, theirs = load_file(stopped / file), load_file(whole / file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), f"{stage}/{file}"
    assert (Results.load(tmp_path / "whole").matrix() == Results.load(tmp_path / "stopped").matrix()).all()


def test_what_a_method_keeps_lies_beside_the_weights_and_grows(world, tmp_path):
    assert run_recipe(world, tmp_path / "run", "--method", "ewc", "--penalty_weight", "1000") == 0
    first, second = (load_file(tmp_path / "run" / stage / "ewc.safetensors") for stage in ("1-bio", "2-cs"))
    key = "importance.roberta.encoder.layer.0.output.dense.weight"
    assert (second[key] >= first[key]).all() and not torch.equal(second[key], first[key])
    assert torch.equal(
        first["anchor.roberta.encoder.layer.0.output.dense.weight"],
        weights_of(tmp_path / "run" / "1-bio")["roberta.encoder.layer.0.output.dense.weight"],
    )
    assert run_recipe(world, tmp_path / "naive", "--method", "naive") == 0
    runs = {name: [weights_of(tmp_path / name / stage) for stage in ("1-bio", "2-cs")] for name in ("run", "naive")}
    for name, stages in runs.items():
        runs[name] = sum((stages[1][k] - stages[0][k]).square().sum() for k in stages[0]).sqrt()
    assert runs["run"] < 0.9 * runs["naive"]  # held, where naive goes on


def test_joint_learns_the_earlier_domains_again(world, tmp_path, monkeypatch):
    seen = []
    train = ContinualTrainer.train
    monkeypatch.setattr(
        ContinualTrainer,
        "train",
        lambda self, **k: (seen.append(list(self.train_dataset.domains)), train(self, **k))[1],
    )
    assert run_recipe(world, tmp_path / "run", "--method", "joint") == 0
    assert seen == [["bio"], ["bio", "cs"]]


def test_a_chosen_alpha_is_reported_on_the_other_half(world, tmp_path):
    assert run_recipe(world, tmp_path / "run", "--method", "interpolate", "--interpolation_alpha", "auto") == 0
    assert run_recipe(world, tmp_path / "all", "--method", "interpolate") == 0
    chosen, fixed = (json.loads((tmp_path / run / "forgetting.json").read_text()) for run in ("run", "all"))
    for domain in ("old", "bio", "cs"):
        here, there = (data["stages"][0]["scores"][domain]["documents"] for data in (chosen, fixed))
        assert here == there // 2
    assert all(0 <= stage["interpolation_alpha"] <= 1 for stage in chosen["stages"][1:])
    assert fixed["stages"][1]["interpolation_alpha"] == 0.5


def test_alpha_is_chosen_on_what_was_learned_and_what_is_named(world, tmp_path, capsys):
    options = ["--method", "interpolate", "--interpolation_alpha", "auto"]

    def chosen_on(name: str, *more: str) -> list[list[str]]:
        assert run_recipe(world, tmp_path / name, *options, *more) == 0
        return [stage["interpolation_chosen_on"] for stage in Results.load(tmp_path / name).stages[1:]]

    assert chosen_on("plain") == [["bio"], ["bio", "cs"]]
    assert re.search(r"α (0\.\d|1\.0), chosen on bio, cs\n", capsys.readouterr().out)
    assert chosen_on("named", "--interpolation_domains", "old") == [["old", "bio"], ["old", "bio", "cs"]]
    assert run_recipe(world, tmp_path / "unknown", *options, "--interpolation_domains", "odl") == 2
    assert "interpolation_domains: there is no held-out text of 'odl'" in capsys.readouterr().err
    assert not (tmp_path / "unknown").exists()


def test_a_run_in_which_a_method_or_an_option_does_nothing_says_so(world, tmp_path, capsys):
    """On the console, and in the results for the report; and once a domain has been learned, of the method no more."""
    assert (
        run_recipe(world, tmp_path / "one", "--domain", "bio", "--method", "ewc", "ema", "--replay_ratio", "0.5") == 0
    )
    warnings = Results.load(tmp_path / "one").run["warnings"]
    (unread,), (idle,) = warnings["training"], warnings["bio"][-1:]
    assert unread == "read by no chosen method (ewc, ema): replay_ratio"
    assert idle.startswith("ewc: no effect") and idle.endswith(
        "without: anchor, das, ema, gate, interpolate, lwf, ncl, pull_back, self_replay"
    )
    printed = capsys.readouterr().out
    assert printed.count(f"warning: {unread}\n") == printed.count(f"warning: {idle}\n") == 1
    further = ["--domain", "cs", "--method", "ewc", "--model_name_or_path", str(tmp_path / "one" / "1-bio")]
    assert run_recipe(world, tmp_path / "further", *further) == 0
    assert run_recipe(world, tmp_path / "two", "--method", "ewc") == 0
    captured = capsys.readouterr()
    assert "no effect" not in captured.out + captured.err and "no chosen" not in captured.out


def test_the_halves_of_a_search_are_the_whole(world, tmp_path):
    """Curves on one half of the held-out documents, the matrix on the other: together what a plain run measures."""
    overrides = {"training": {"eval_strategy": "steps", "eval_steps": 4}, "method": "naive"}

    def walk(name: str, **options: bool) -> Results:
        recipe = load_recipe(world / "recipe.yaml", {**overrides, "output_dir": str(tmp_path / name)})
        return continual_pretrain(recipe, **options)

    here, whole = (results.stages[-1]["scores"] for results in (walk("halves", halves=True), walk("whole")))
    history = json.loads((tmp_path / "halves" / "2-cs" / "trainer_state.json").read_text())["log_history"]
    curve = {key: value for entry in history for key, value in entry.items() if key.startswith("eval_")}
    for domain, score in whole.items():
        parts = [(curve[f"eval_{domain}_{key}"], here[domain][key]) for key in ("loss", "tokens", "documents")]
        losses, tokens, documents = map(np.array, parts)
        assert losses @ tokens / tokens.sum() == pytest.approx(score["loss"], rel=1e-5)
        assert documents.sum() == score["documents"] and documents.min() > 0


def test_one_document_cannot_be_halved(world, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12")
    options = ["--method", "interpolate", "--interpolation_alpha", "auto", "--measure", f"one={tmp_path}/one.txt"]
    assert run_recipe(world, tmp_path / "run", *options) == 2
    assert "cannot be halved" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.needs_domain_ends])
def test_methods_that_consolidate_refuse_schedules_without_domain_ends(method, world, tmp_path, capsys):
    assert run_recipe(world, tmp_path / "run", "--method", method, "--schedule", "interleaved") == 2
    assert f"'{method}'" in capsys.readouterr().err and not (tmp_path / "run").exists()
