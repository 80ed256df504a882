"""`remember` in recipes, on the command line and in a walk; the file of self-written text; the bound on drift."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from das_lm.cli import main
from das_lm.errors import UserError
from das_lm.files import partial_path
from das_lm.measure.drift import Drift, DriftExceeded, check_drifts
from das_lm.measure.results import Results
from das_lm.methods.writing import Writer, load_written
from das_lm.run.recipe_file import load_recipe
from das_lm.run.self_text import write_self_text
from tests.helpers import refused, run_recipe

SMALL = ["--memory_size", "16", "--self_replay_sweeps", "1", "--anchor_variants", "2"]


@pytest.fixture(scope="module")
def anchored(world, tmp_path_factory):
    """A run of the anchor on the model's own text and on other."""
    output = tmp_path_factory.mktemp("anchored") / "run"
    shutil.copy(world / "old.txt", world / "other.txt")
    options = ["--remember", "self=16", f"other={world}/other.txt", "--method", "anchor", *SMALL]
    assert run_recipe(world, output, *options, "--drift_budget", "0.01") == 0
    return output


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "self.safetensors"
    write_self_text(str(world / "model"), 10, path, {"max_length": 24, "use_cpu": True, "disable_tqdm": True})
    return path


# ---- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remember", "expected"),
    [
        ("self", [("self", "self", None, 1.0)]),
        ("[self]", [("self", "self", None, 1.0)]),
        ("[{self: 4096, weight: 2}]", [("self", "self", 4096, 2.0)]),
        ("[{self: here.safetensors}]", [("self", "self:here.safetensors", None, 1.0)]),
        (
            "[{name: wiki, data: built-in:general, weight: 0.5, budget: 0.1}, self]",
            [("wiki", "built-in:general", None, 0.5), ("self", "self", None, 1.0)],
        ),
    ],
)
def test_entries_of_a_recipe(remember, expected, world, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text((world / "recipe.yaml").read_text() + f"remember: {remember}\n")
    recipe = load_recipe(path)
    assert [(one.name, one.data, one.rows, one.weight) for one in recipe.remember] == expected
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["self"], [("self", "self", None)]),
        (["self=64", "other=old.txt"], [("self", "self", 64), ("other", "old.txt", None)]),
        (["self=mine.safetensors"], [("self", "self:mine.safetensors", None)]),
    ],
)
def test_entries_on_the_command_line(options, expected, world):
    recipe = load_recipe(world / "recipe.yaml", {"remember": options})
    assert [(one.name, one.data, one.rows) for one in recipe.remember] == expected


@pytest.mark.parametrize(
    ("entry", "phrase"),
    [
        ("{name: wiki, data: built-in:general, rows: 4}", "rows: is for text that the model writes"),
        ("{name: wiki, data: nothing.txt}", "nothing.txt"),
        ("{name: wiki, data: built-in:general, weight: 0}", "no entry has a weight above 0"),
        ("{name: wiki, data: built-in:general, weight: -1}", "weight"),
        ("{name: wiki, data: built-in:general, training: {seed: 1}}", "is for domains that are learned"),
        ("{name: wiki, data: '*.jsonl', streaming: true}", "Write max_documents"),
        ("{name: bio, data: built-in:general}", "'bio' stands there twice"),
        ("{name: old, data: built-in:general}", "'old' stands there twice"),
        ("{self: 0}", "rows"),
        ("{self: 8, colum: x}", "Did you mean 'column'"),
        ("{self: nothing.safetensors}", "nothing.safetensors cannot be read"),
        ("{name: self, data: self, streaming: true}", "the model writes this"),
    ],
)
def test_bad_entries(entry, phrase, world, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text((world / "recipe.yaml").read_text() + f"remember: [{entry}]\n")
    assert phrase in refused(tmp_path, tmp_path / "run", capsys, "--method", "anchor")


# ---- a walk ---------------------------------------------------------------------------------------------------------


def test_a_walk_with_a_budget(anchored):
    stages = Results.load(anchored).stages
    assert stages[1]["remembered"]["self"] == 16 and stages[1]["remembered"]["other"] > 0
    for stage, bound in zip(stages[1:], (0.005, 0.01), strict=True):  # each domain may take a half
        assert stage["drift_budget"]["self"] == pytest.approx(bound) and "budget_holds" in stage
        assert stage["divergence"]["self"][0] <= bound or stage["landed_at"] == 0
    assert set(stages[2]["drift_budget"]) == {"self", "other", "bio"}
    first, second = (load_file(anchored / name / "remembered.safetensors") for name in ("1-bio", "2-cs"))
    assert (first["written.self"] == second["written.self"]).all()


def test_overlap_with_measured_text_is_told(anchored):
    (warning,) = Results.load(anchored).run["warnings"]["old"]
    assert "'old'" in warning and "stand in training text" in warning


def test_a_walk_that_is_interrupted_while_it_writes_ends_the_same(world, anchored, tmp_path, monkeypatch):
    output = tmp_path / "run"
    options = ["--remember", "self=16", f"other={world}/other.txt", "--method", "anchor", *SMALL]
    options += ["--drift_budget", "0.01"]

    def killed(self, rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_gibbs", killed)
        assert run_recipe(world, output, *options) == 130
    assert run_recipe(world, output, *options, "--resume") == 0
    for name in ("model", "anchor", "remembered"):
        ours, theirs = (load_file(one / "2-cs" / f"{name}.safetensors") for one in (output, anchored))
        assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in ours)


def test_without_keep_text_no_text_of_the_user_is_in_any_file(world, tmp_path):
    output = tmp_path / "run"
    options = ["--remember", f"other={world}/other.txt", "--method", "das", "anchor", "--keep_text", "false"]
    assert run_recipe(world, output, *options, *SMALL, "--anchor_teacher", "cached") == 0
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    whole = b"".join(path.read_bytes() for path in output.rglob("*") if path.suffix == ".safetensors")
    for name in ("bio", "cs", "other"):
        for line in (world / f"{name}.txt").read_text().splitlines():
            ids = tokenizer(line, add_special_tokens=False)["input_ids"]
            assert all(np.array(ids, dtype=kind).tobytes() not in whole for kind in ("<i2", "<i4", "<i8"))
    assert all("samples" not in stage for stage in Results.load(output).stages)  # words of held-out text


def test_one_domain_and_a_penalty(world, tmp_path, capsys):
    """With something to remember, a penalty has an effect in the first domain, and nobody is told that it has none."""
    one = ["--domain", "bio", "--method", "ewc", "--penalty_weight", "100"]
    assert run_recipe(world, tmp_path / "without", *one) == 0
    assert "no effect" in capsys.readouterr().out
    assert run_recipe(world, tmp_path / "with", *one, "--remember", f"other={world}/other.txt") == 0
    assert "no effect" not in capsys.readouterr().out
    ours, theirs = (load_file(tmp_path / name / "1-bio" / "model.safetensors") for name in ("with", "without"))
    assert any((ours[key] != theirs[key]).any() for key in ours)


# ---- self-written text as a file ------------------------------------------------------------------------------------


def test_a_file_is_written_and_remembered(world, written, tmp_path):
    rows, facts = load_written(written, AutoTokenizer.from_pretrained(world / "model"))
    assert len(rows) == 10 and all(len(row["input_ids"]) == 24 for row in rows)
    assert facts["rows"] == "10" and facts["seed"] == "42" and facts["sweeps"] == "8"
    options = ["--remember", f"self={written}", "--method", "anchor", *SMALL]
    assert run_recipe(world, tmp_path / "run", *options) == 0
    assert Results.load(tmp_path / "run").stages[1]["remembered"] == {"self": 10}
    names = load_file(tmp_path / "run" / "2-cs" / "remembered.safetensors").keys()
    assert names == {"begun"}  # the file is not written again


def test_writing_goes_on_where_it_was_interrupted(world, written, tmp_path, monkeypatch):
    path = tmp_path / "again.safetensors"
    command = ["self-text", str(world / "model"), "--rows", "10", "--output", str(path), "--max_length", "24"]
    command += ["--use_cpu", "--disable_tqdm", "true"]
    monkeypatch.setattr(Writer, "batch_size", 4)
    whole = tmp_path / "whole.safetensors"
    assert main([*command[:5], str(whole), *command[6:]]) == 0
    gibbs, calls = Writer._gibbs, []

    def killed(self, rows):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return gibbs(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_gibbs", killed)
        assert main(command) == 130
    assert partial_path(path).is_file() and not path.exists()
    calls.clear()
    monkeypatch.setattr(Writer, "_gibbs", lambda self, rows: calls.append(rows) or gibbs(self, rows))
    assert main(command) == 0
    assert calls == [4, 2] and not partial_path(path).exists()
    assert (load_file(path)["input_ids"] == load_file(whole)["input_ids"]).all()


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--rows", "4"], "--output is missing"),
        (["--output", "x.safetensors"], "--rows is missing"),
        (["--rows", "0", "--output", "x.safetensors"], "rows: 0 must be at least 1"),
        (["--rows", "4", "--output", "x.txt"], "name it x.safetensors"),
    ],
)
def test_what_is_not_written(world, options, phrase, capsys):
    assert main(["self-text", str(world / "model"), *options, "--use_cpu"]) == 2
    assert phrase in capsys.readouterr().err


def test_a_file_that_is_there_stays(world, written, capsys):
    before = written.read_bytes()
    assert main(["self-text", str(world / "model"), "--rows", "4", "--output", str(written), "--use_cpu"]) == 2
    assert "is there already" in capsys.readouterr().err and written.read_bytes() == before


# ---- a bound on drift -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bound", "status"), [("1000", 0), ("-1000", 3)])
def test_the_status_of_a_bound(finished, tmp_path, capsys, bound, status):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    assert main(["evaluate", "--run", str(output), "--max_drift", f"old={bound}"]) == status
    told = capsys.readouterr()
    assert ("exceeded beyond noise" in told.err) == (status == 3) and "Traceback" not in told.err
    matrix = Results.load(finished).matrix()
    assert f"{matrix[2, 0] - matrix[0, 0]:+.3f}" in told.out
    assert json.loads((output / "forgetting.json").read_text())["stages"]  # all is measured and written


@pytest.mark.parametrize(
    ("given", "phrase"),
    [("old=x", "'x' is no number"), ("odd=1", "no held-out text of 'odd'"), ("old=nan", "no number")],
)
def test_no_bound(finished, capsys, given, phrase):
    assert main(["evaluate", "--run", str(finished), "--max_drift", given]) == 2
    assert phrase in capsys.readouterr().err


def test_noise_exceeds_no_bound():
    verdicts = {one.verdict for one in (Drift("a", "d", 0.1, 0.2, low, 0.3) for low in (0.05, 0.15))}
    assert verdicts == {"undecided", "exceeded"} and Drift("a", "d", 0.1, 0.0, -0.1, 0.05).verdict == "within"
    check_drifts([Drift("a", "d", 0.1, 0.2, 0.05, 0.3)])
    with pytest.raises(DriftExceeded, match="'d' \\+0.200 > 0.1 after 'a'") as raised:
        check_drifts([Drift("a", "d", 0.1, 0.2, 0.15, 0.3)])
    assert raised.value.status == 3 and isinstance(raised.value, UserError)
