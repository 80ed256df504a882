"""The walk over domains: what it writes, and what it refuses. How it goes on: `end_to_end/test_faults.py`."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    RobertaForSequenceClassification,
)

from das_lm.cli import main
from das_lm.measure.results import Results
from das_lm.run import directory as run_directory
from das_lm.run.recipe_file import load_recipe
from das_lm.training.trainer import ContinualTrainer
from das_lm.units import Units
from das_lm.units.importance import Importance
from tests.helpers import Interrupted, build_tokenizer, run_recipe, save_model, tiny_roberta


def test_walk_writes_whole_checkpoints_and_the_matrix(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        ".das-lm.json",
        "1-bio",
        "2-cs",
        "forgetting.json",
        "measured",
        "recipe.yaml",
    ]
    results = Results.load(finished)
    assert [stage["name"] for stage in results.stages] == ["base", "bio", "cs"]
    assert results.domains == {"old": None, "bio": 1, "cs": 2}
    assert results.matrix().shape == (3, 3)
    assert [stage.get("step") for stage in results.stages] == [None, 6, 4]  # a domain's own training arguments hold
    assert results.stages[2]["importance_of"] == ["general", "bio", "cs"]
    for directory in (finished / "1-bio", finished / "2-cs"):
        AutoModelForMaskedLM.from_pretrained(directory)
        AutoTokenizer.from_pretrained(directory)
        suffixes = {path.suffix for path in directory.iterdir()}
        assert suffixes == {".json", ".safetensors", ".md"}
    data = json.loads((finished / "forgetting.json").read_text())
    assert data["run"]["recipe"]["domains"][0]["name"] == "bio"
    assert data["summary"]["loss"]["drift"] == pytest.approx(results.matrix()[2, 0] - results.matrix()[0, 0])


@pytest.mark.parametrize("adapter", [[], ["--peft", '{"r": 2, "target_modules": ["query"]}']])
def test_the_umask_gives_the_rights_of_every_file(world, tmp_path, monkeypatch, adapter):
    """The weights, of a domain and of a checkpoint, as the JSON beside them."""
    rights, output = {}, tmp_path / "run"

    def note(*_):
        rights.update({path: path.stat().st_mode & 0o777 for path in output.rglob("*") if path.is_file()})

    before = os.umask(0o027)
    try:
        monkeypatch.setattr("das_lm.run.walk.write_card", note)
        assert run_recipe(world, output, *adapter) == 0
    finally:
        os.umask(before)
    weights = {path.relative_to(output).parts[0] for path in rights if path.suffix == ".safetensors"}
    assert weights >= {"1-bio", "1-bio.training", "measured"}
    assert {str(path): right for path, right in rights.items() if right != 0o640} == {}


def test_a_directory_is_no_markup(world, finished, tmp_path, capsys):
    """It would end a tag that rich does not know of, after all the training."""
    output = tmp_path / "a[/b]"
    shutil.copytree(finished, output)
    assert run_recipe(world, output, "--resume") == 0
    printed = capsys.readouterr().out
    assert f"Results: {output}/forgetting.json    Model: {output}/2-cs" in printed
    assert f"Report: {output}/report.html" in printed


def test_finished_domains_are_not_repeated(world, finished, tmp_path, monkeypatch):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    monkeypatch.setattr(ContinualTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert run_recipe(world, output, "--resume") == 0
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def test_another_run_is_overwritten_only_when_told_to(world, finished, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "notes.md").write_text("mine")
    before = (output / "forgetting.json").read_bytes()
    assert run_recipe(world, output) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert run_recipe(world, output, "--resume", "--learning_rate", "1e-4") == 2
    assert "began with training.learning_rate: 0.001, not 0.0001" in capsys.readouterr().err
    assert (output / "forgetting.json").read_bytes() == before
    assert run_recipe(world, output, "--overwrite_output_dir", "--method", "naive", "--domain", "bio") == 0
    left = sorted(path.name for path in output.iterdir())
    assert left == [".das-lm.json", "1-bio", "forgetting.json", "measured", "notes.md", "recipe.yaml"]
    assert not (output / "1-bio" / "importance.safetensors").exists()


def _tree(directory):
    """What a directory holds; of what changes with every look, the name."""
    return {path.relative_to(directory): path.is_file() and path.read_bytes() for path in directory.rglob("*")}


def test_a_recipe_alone_makes_no_run(world, tmp_path, capsys):
    """A directory of the user's, in which nothing may be lost."""
    output = tmp_path / "mine"
    (output / "1-data").mkdir(parents=True)
    shutil.copy(world / "recipe.yaml", output)
    (output / "1-data" / "text.txt").write_text("mine")
    (output / "forgetting.json").write_text("{}")
    before = _tree(output)
    for options in ([], ["--overwrite_output_dir"], ["--resume"]):
        assert run_recipe(world, output, *options) == 2
        error = capsys.readouterr().err
        assert "holds no run" in error and "--overwrite_output_dir" not in error
    assert _tree(output) == before


def test_what_no_run_wrote_is_named_and_kept(world, finished, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    others = ["1-bio/notes.md", "2-cs.training/notes.md", "measured/mine.safetensors", "figures/mine.png"]
    for name in others:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("mine")
    before = _tree(output)
    assert run_recipe(world, output, "--overwrite_output_dir") == 2
    assert ", ".join(others[:1] + sorted(others[1:])[:2]) in capsys.readouterr().err
    assert _tree(output) == before


def test_what_stands_in_the_way_of_a_new_run_is_no_domain_of_it(world, finished, tmp_path, capsys):
    """It would count as learned."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    shutil.copytree(output / "2-cs", output / "1-cs")
    before = _tree(output)
    assert run_recipe(world, output, "--overwrite_output_dir", "--domain", "cs") == 2
    assert "no run wrote 1-cs in" in capsys.readouterr().err
    assert _tree(output) == before


def test_a_lock_of_the_user_stays(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").write_text("mine")
    assert run_recipe(world, tmp_path / "out") == 2
    assert (tmp_path / "out" / ".lock").read_text() == "mine"


def test_a_run_of_an_older_release_can_be_overwritten(world, finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / ".das-lm.json").unlink()
    assert run_recipe(world, output, "--overwrite_output_dir", "--method", "naive", "--domain", "cs") == 0
    assert sorted(path.name for path in output.glob("[0-9]*-*")) == ["1-cs"]


@pytest.mark.parametrize(
    "option, value",
    [("model_name_or_path", "1-bio"), ("importance", "1-bio"), ("domain", "cs=*.txt"), ("measure", "old=text.txt")],
)
def test_what_a_run_reads_stands_outside_of_its_output(world, finished, tmp_path, capsys, option, value):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "text.txt").write_text("mine")
    name, given, path = value.rpartition("=")
    assert run_recipe(world, output, "--overwrite_output_dir", f"--{option}", f"{name}{given}{output}/{path}") == 2
    assert f"is inside of the output directory {output}" in capsys.readouterr().err
    assert (output / "text.txt").exists() and (output / "2-cs").exists()


NEW = ("--overwrite_output_dir", "--method", "naive")


def test_the_run_before_comes_back_if_the_new_one_fails(world, finished, tmp_path, monkeypatch):
    """Before its first checkpoint. Later it can be resumed, and the run before waits until a domain is learned."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = _tree(output)
    step = ContinualTrainer.training_step

    def fail(self, *arguments):
        if self.state.global_step == at:
            raise Interrupted
        return step(self, *arguments)

    monkeypatch.setattr(ContinualTrainer, "training_step", fail)
    at = 1
    with pytest.raises(Interrupted):
        run_recipe(world, output, *NEW)
    assert _tree(output) == before
    at = 2
    with pytest.raises(Interrupted):
        run_recipe(world, output, *NEW)
    assert _tree(output / ".overwritten") == before
    at = None
    assert run_recipe(world, output, "--method", "naive", "--resume") == 0
    assert not (output / ".overwritten").exists()
    assert Results.load(output).run["recipe"]["method"] == ["naive"]


@pytest.mark.parametrize("moment", range(18))
def test_a_kill_while_a_run_is_set_aside_loses_nothing(world, finished, tmp_path, monkeypatch, moment):
    """Nor while it is put back."""

    class Killed(BaseException):
        pass

    def until_killed(function):
        def wrapper(*arguments, **options):
            calls.append(function)
            if len(calls) > moment:
                raise Killed
            return function(*arguments, **options)

        return wrapper

    output, calls, recipe = tmp_path / "run", [], load_recipe(world / "recipe.yaml")
    shutil.copytree(finished, output)
    before = _tree(output)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        for where, name in ((os, "rename"), (os, "rmdir"), (Path, "mkdir"), (Path, "unlink")):
            patch.setattr(where, name, until_killed(getattr(where, name)))
        patch.setattr(run_directory, "write_json", until_killed(run_directory.write_json))
        run_directory.open_output(output, recipe, overwrite=True)
        run_directory.undo_overwriting(output)
        pytest.fail("not killed")
    assert run_recipe(world, output) == 2
    assert before in (_tree(output), _tree(output / ".overwritten"))


@pytest.mark.parametrize("schedule", ["alternating", "interleaved"])
def test_mixed_schedules_learn_all_domains_in_one_stage(world, tmp_path, schedule):
    output = tmp_path / "run"
    recipe = (world / "recipe.yaml").read_text().replace(", training: {max_steps: 6}", "")
    (tmp_path / "recipe.yaml").write_text(recipe)
    options = ["--recipe", str(tmp_path / "recipe.yaml"), "--output_dir", str(output), "--method", "naive"]
    assert main(["pretrain", *options, "--schedule", schedule]) == 0
    results = Results.load(output)
    assert results.domains == {"old": None, "bio": 1, "cs": 1}
    assert len(results.stages) == 2


def test_warnings_about_the_text_are_counted_and_kept(world, tmp_path, capsys):
    lines = (world / "bio.txt").read_text().splitlines()
    text = tmp_path / "text.txt"
    text.write_text("\n".join([*lines, lines[0], "w1"]))
    assert run_recipe(world, tmp_path / "run", "--domain", f"bio={text}", "--method", "naive") == 0
    assert "warning: domain 'bio'" in " ".join(capsys.readouterr().out.split())
    assert Results.load(tmp_path / "run").run["warnings"]["bio"]


def _bloom(world: Path, tmp_path: Path) -> list[str]:
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    return ["--model_name_or_path", str(save_model(model, tmp_path / "bloom"))]


def _no_head(world: Path, tmp_path: Path) -> list[str]:
    model = RobertaForSequenceClassification(tiny_roberta().config)
    return ["--model_name_or_path", str(save_model(model, tmp_path / "no_head"))]


def _albert(world: Path, tmp_path: Path) -> list[str]:
    config = AlbertConfig(vocab_size=64, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    return ["--model_name_or_path", str(save_model(AlbertForMaskedLM(config), tmp_path / "albert"))]


def _other_importance(world: Path, tmp_path: Path) -> list[str]:
    units = Units(tiny_roberta(num_attention_heads=2))
    importance = Importance("paper")
    importance.accumulate("x", {key: torch.rand(size) for key, size in units.sizes.items()})
    importance.save(tmp_path / "other.safetensors", units)
    return ["--importance", str(tmp_path / "other.safetensors")]


def _broken_weights(world: Path, tmp_path: Path) -> list[str]:
    shutil.copytree(world / "model", tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return ["--model_name_or_path", str(tmp_path / "broken")]


def _no_tokenizer(world: Path, tmp_path: Path) -> list[str]:
    tiny_roberta().save_pretrained(tmp_path / "bare")
    return ["--model_name_or_path", str(tmp_path / "bare")]


def _large_tokenizer(world: Path, tmp_path: Path) -> list[str]:
    return ["--model_name_or_path", str(save_model(tiny_roberta(vocab_size=40), tmp_path / "small"))]


def _nan_weights(world: Path, tmp_path: Path) -> list[str]:
    model = tiny_roberta()
    model.lm_head.dense.weight.data[0, 0] = float("nan")
    return ["--model_name_or_path", str(save_model(model, tmp_path / "nan"))]


def _no_mask(world: Path, tmp_path: Path) -> list[str]:
    tiny_roberta().save_pretrained(tmp_path / "unmasked")
    tokenizer = build_tokenizer()
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "unmasked")
    return ["--model_name_or_path", str(tmp_path / "unmasked")]


BAD_MODELS = {
    "no such model": (lambda *_: ["--model_name_or_path", "nowhere/such-model"], "'nowhere/such-model'", "loaded"),
    "unsupported decoder": (_bloom, "'bloom'", "llama"),
    "unsupported architecture": (_albert, "'albert'", "modernbert"),
    "LM head missing": (_no_head, "random", "lm_head"),
    "truncated weights": (_broken_weights, "model_name_or_path", "cannot be loaded"),
    "no tokenizer": (_no_tokenizer, "no tokenizer is saved", "bare"),
    "tokenizer of another model": (_large_tokenizer, "ids up to 63", "40"),
    "tokenizer without mask": (_no_mask, "no mask token", ""),
    "importance of another model": (_other_importance, "layers.0.head", "2 units"),
    "length beyond the model's": (lambda *_: ["--max_length", "64"], "max_length: 64", "38"),
    "NaN loss": (_nan_weights, "nan", "old"),
    "refused optimizer": (lambda *_: ["--optim", "lomo"], "lomo", "backward"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model_is_one_message_and_status_2(world, tmp_path, capsys, case):
    make, *phrases = BAD_MODELS[case]
    output = tmp_path / "output" / "run"
    options = make(world, tmp_path)
    assert run_recipe(world, output, *options) == 2
    error = capsys.readouterr().err
    error, *others = [line for line in error.splitlines() if "das-lm" in line or "Traceback" in line]
    assert error.startswith("das-lm: error: ") and not others
    assert all(phrase in error for phrase in phrases), error
    assert not output.exists()  # the corrected command is no other run


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model_does_not_cost_the_run_that_it_would_overwrite(world, finished, tmp_path, case):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert run_recipe(world, output, "--overwrite_output_dir", *BAD_MODELS[case][0](world, tmp_path)) == 2
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def test_bad_arguments_of_a_later_domain_are_found_before_anything_is_written(world, tmp_path, capsys):
    recipe = (world / "recipe.yaml").read_text().replace("cs.txt}", "cs.txt, training: {optim: lomo}}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert main(["pretrain", "--recipe", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]) == 2
    assert "lomo" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["proxy", "file"])
def test_a_given_importance_is_that_of_the_base_model_and_accumulates(world, finished, tmp_path, source):
    where = "proxy" if source == "proxy" else str(finished / "1-bio")
    assert run_recipe(world, tmp_path / "run", "--importance", where, "--domain", "cs", "bio") == 0
    first = ["general"] if source == "proxy" else ["general", "bio"]
    stages = Results.load(tmp_path / "run").stages
    assert [stage.get("importance_of") for stage in stages] == [None, [*first, "cs"], [*first, "cs", "bio"]]


def test_output_that_cannot_be_written(world, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for output, phrase in (("file", "is a file"), ("file/run", "cannot write"), ("full", "holds no run")):
        assert run_recipe(world, tmp_path / output) == 2
        assert phrase in capsys.readouterr().err
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"


def test_resume_without_a_run(world, tmp_path, capsys):
    assert run_recipe(world, tmp_path / "nothing", "--resume") == 2
    assert "holds no run" in capsys.readouterr().err
