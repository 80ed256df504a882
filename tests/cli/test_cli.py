"""The command line, in process: what reaches the walk, and one message and status 2 for every mistake."""

import dataclasses
import errno
import io
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

import das_lm
from das_lm.cli import COMMANDS, main
from das_lm.cli.evaluate import TRAINING as EVALUATED
from das_lm.errors import UserError
from das_lm.methods import METHODS
from das_lm.training.config import DASConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def walk(monkeypatch):
    """Stands in for `das_lm.run.walk`; collects the calls."""
    calls = []
    module = types.ModuleType("das_lm.run.walk")
    module.continual_pretrain = lambda recipe, **kwargs: calls.append((recipe, kwargs))
    monkeypatch.setitem(sys.modules, "das_lm.run.walk", module)
    return calls


def run(capsys, *arguments):
    status = main(["pretrain", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_walk_gets_the_recipe(walk, capsys):
    assert run(capsys, "--recipe", "bio_then_cs") == (0, "", "")
    recipe, options = walk[0]
    assert [domain.name for domain in recipe.domains] == ["bio", "cs"]
    assert recipe.method == ["das", "anchor", "interpolate"] and [one.name for one in recipe.remember] == ["sample"]
    assert options == {"resume": False, "overwrite": False}


def test_every_value_can_be_overridden(walk, capsys):
    arguments = (
        "--recipe bio_then_cs --model_name_or_path roberta-base --domain bio=papers/*.jsonl.gz --domain cs "
        "--measure other=o.csv --text_column body --method naive --schedule alternating --output_dir out "
        "--attn_implementation eager --trust_remote_code --learning_rate 1e-4 --max_steps 20 --resume "
        "--overwrite_output_dir true --soft_mask_units head output --no_contrast_prior_gradient --use_cpu "
        '--gradient_checkpointing_kwargs {"use_reentrant":false} --lr_scheduler_type cosine'
    )
    assert run(capsys, *arguments.split())[0] == 0
    recipe, options = walk[0]
    assert options == {"resume": True, "overwrite": True}
    assert recipe.model_name_or_path == "roberta-base"
    assert [(domain.name, domain.data, domain.column) for domain in recipe.domains] == [
        ("bio", "papers/*.jsonl.gz", "body"),
        ("cs", "built-in", "text"),
    ]
    assert [domain.name for domain in recipe.measure] == ["general", "other"]
    assert (recipe.method, recipe.schedule, recipe.output_dir) == (["naive"], "alternating", "out")
    assert (recipe.attn_implementation, recipe.trust_remote_code) == ("eager", True)
    arguments = recipe.training_arguments(recipe.domains[0], "out")
    assert (arguments.learning_rate, arguments.max_steps, arguments.use_cpu) == (1e-4, 20, True)
    assert (arguments.soft_mask_units, arguments.contrast_prior_gradient) == (["head", "output"], False)
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert arguments.lr_scheduler_type == "cosine"


def test_only_what_is_given_goes_before_the_recipe(walk, capsys):
    run(capsys, "--recipe", "bio_then_cs")
    run(capsys, "--recipe", "bio_then_cs", "--seed", "7")
    before, after = (recipe for recipe, _ in walk)
    assert after.training == {**before.training, "seed": 7}


def test_print_recipe_prints_what_would_run_and_runs_nothing(walk, capsys):
    status, out, err = run(capsys, "--recipe", "bio_then_cs_roberta", "--max_steps", "9", "--print_recipe")
    assert (status, err, walk) == (0, "", [])
    printed = yaml.safe_load(out)
    assert printed["training"]["max_steps"] == 9
    assert printed["training"]["bf16"] is True  # also where no GPU is


def test_every_field_of_the_config_is_an_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--help_all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(DASConfig):
        assert f"  --{field.name}" in text
    assert text.index("\nrecipe:") < text.index("\nDAS:") < text.index("\ntraining:")
    assert text.index("\nDAS:") < text.index("  --contrast_weight") < text.index("\ntraining:")
    assert text.index("\ntraining:") < text.index("  --learning_rate")
    assert "--learning-rate" not in text  # one spelling of two
    assert "(default: 5e-05)" in " ".join(text.split())


def _help(capsys, command, option="--help"):
    with pytest.raises(SystemExit) as stop:
        main([command, option])
    assert stop.value.code == 0
    return capsys.readouterr().out


TRAINING = ("pretrain", "evaluate", "sweep", "self-text", "classic", "search-lambda")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_a_command_and_imports_nothing_heavy(command):
    code = (
        "import sys; from das_lm.cli import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "finally: print(*{'torch', 'transformers', 'datasets', 'numpy', 'scipy', 'pydantic'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    *shown, heavy = result.stdout.split("\n")[:-1]
    assert heavy == ""
    assert any("--help_all" in line for line in shown) == (command in TRAINING)
    assert not any(line.startswith("  --weight_decay") for line in shown)


def test_help_lists_the_methods(capsys):
    lines = _help(capsys, "pretrain").split("\nmethods:\n")[1].splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "] == sorted(METHODS)
    assert any(line.startswith("  mas            MAS: what changes the output is important") for line in lines)


def test_evaluate_takes_the_training_arguments_that_it_reads(capsys):
    assert set(EVALUATED) <= {field.name for field in dataclasses.fields(DASConfig)}
    shown = _help(capsys, "evaluate", "--help_all")
    assert "  --mlm_probability" in shown and "--ewc_mode" not in shown and "--learning_rate" not in shown.split()
    assert main(["evaluate", "--run", "x", "--ewc_mode", "online"]) == 2
    assert "unknown option '--ewc_mode'" in capsys.readouterr().err


def test_version_and_module(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"das-lm {das_lm.__version__}\n"
    for arguments, status in ((["--version"], 0), (["prtrain"], 2)):
        command = [sys.executable, "-m", "das_lm", *arguments]
        assert subprocess.run(command, capture_output=True, timeout=60).returncode == status


def test_recipes_and_help(capsys):
    assert main(["recipes"]) == 0
    assert "bio_then_cs_roberta" in capsys.readouterr().out
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        assert "pretrain" in capsys.readouterr().out


def test_the_script_takes_the_same_arguments(walk, capsys, monkeypatch):
    import runpy

    monkeypatch.setattr(sys, "argv", ["continual_pretrain.py", "--recipe", "bio_then_cs", "--seed", "5"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "continual_pretrain.py"), run_name="__main__")
    assert stop.value.code == 0
    assert walk[0][0].training["seed"] == 5


BAD = [
    ("", "--recipe is missing; give the path of a .yaml file or one of bio_then_cs"),
    ("--recipe bio_then", "recipe 'bio_then': no such file, and no recipe of that name. Did you mean 'bio_then_cs'?"),
    ("--recipe broken.yaml", "broken.yaml:2: domians: unknown key. Did you mean 'domains'?"),
    ("--recipe bio_then_cs --lerning_rate 1", "unknown option '--lerning_rate'. Did you mean '--learning_rate'?"),
    ("--recipe bio_then_cs --lerning_rate=1", "unknown option '--lerning_rate'. Did you mean '--learning_rate'?"),
    ("--recipe bio_then_cs --learning_rat 1", "unknown option '--learning_rat'"),  # no abbreviations
    ("--recipe bio_then_cs here", "unexpected argument 'here'"),
    ("--recipe bio_then_cs --max_steps ten", "--max_steps: invalid int value: 'ten'"),
    ("--recipe bio_then_cs --max_steps", "--max_steps: expected one argument"),
    ("--recipe bio_then_cs --bf16 maybe", "--bf16: Truthy value expected: got maybe"),
    ("--recipe bio_then_cs --lr_scheduler_type cosin", "--lr_scheduler_type: invalid choice: 'cosin'"),
    ("--recipe bio_then_cs --liger_kernel_config rope", "--liger_kernel_config: invalid json_value value: 'rope'"),
    (
        "--recipe bio_then_cs --max_length 4",
        "--max_length: domain 'bio': training arguments: max_length: 4 must be at",
    ),
    ("--recipe bio_then_cs --resume_from_checkpoint x", "is not for recipes; continue a run with --resume"),
    ("--recipe bio_then_cs --method dass", "--method: there is no method 'dass'. Did you mean 'das'?"),
    ("--recipe bio_then_cs --schedule interleaved", "'interleaved' does not go with the method 'das'"),
    ("--recipe bio_then_cs --domain bio bio", "--domain bio: 'bio' is given twice"),
    ("--recipe bio_then_cs --domain nowhere", "--domain nowhere: neither the recipe nor the built-in text has"),
    ("--recipe bio_then_cs --domain a/b=c.txt", "'a/b' names a folder"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_mistakes(arguments, message, walk, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("model_name_or_path: built-in\ndomians: []\n")
    status, out, err = run(capsys, *arguments.split())
    assert (status, out, walk) == (2, "", [])
    assert err.startswith("das-lm: error: ")
    assert message in err.replace("/--max-steps", "").replace("/--lr-scheduler-type", "").replace(
        "/--liger-kernel-config", ""
    )
    assert "Traceback" not in err and "usage" not in err
    assert list(tmp_path.iterdir()) == [tmp_path / "broken.yaml"]


def test_unknown_command(capsys):
    assert main(["prtrain"]) == 2
    assert capsys.readouterr().err == "das-lm: error: there is no command 'prtrain'. Did you mean 'pretrain'?\n"
    assert main(["recipes", "--all"]) == 2


def test_errors_of_the_walk(walk, capsys, monkeypatch):
    def fail(error):
        def continual_pretrain(recipe, **kwargs):
            raise error

        sys.modules["das_lm.run.walk"].continual_pretrain = continual_pretrain
        return run(capsys, "--recipe", "bio_then_cs")

    assert fail(UserError("the disk is full")) == (2, "", "das-lm: error: the disk is full\n")
    status, _, err = fail(KeyboardInterrupt())
    assert status == 130 and "--resume continues" in err
    with pytest.raises(ValueError):  # a mistake of ours keeps its traceback
        fail(ValueError())
    monkeypatch.setenv("RANK", "1")  # left over from somewhere; a launcher sets all three
    assert fail(UserError("the disk is full")) == (2, "", "das-lm: error: the disk is full\n")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fail(UserError("the disk is full")) == (2, "", "")


def test_a_full_disk_is_one_message(monkeypatch, capsys):
    """Whatever command meets it; another error of the system is a bug, and shows itself."""

    def full(arguments):
        raise OSError(number, os.strerror(number), "x/report.html")

    monkeypatch.setitem(COMMANDS, "report", full)
    number = errno.ENOSPC
    assert main(["report", "x"]) == 2
    assert capsys.readouterr().err == (
        "das-lm: error: x/report.html: No space left on device; free some space, or make it writable, and run the "
        "command again\n"
    )
    number = errno.ECHILD
    with pytest.raises(OSError):
        main(["report", "x"])


@pytest.mark.parametrize("given", [["--output_dir=~/x"], []])
def test_the_output_directory_may_be_below_home(given, walk, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("model_name_or_path: built-in\noutput_dir: ~/x\ndomains: [{name: bio}]\n")
    assert run(capsys, "--recipe", str(tmp_path / "r.yaml"), *given) == (0, "", "")
    assert walk[0][0].output_dir == f"{tmp_path}/x"
    calls = []
    monkeypatch.setattr("das_lm.report.page.write_report", lambda *arguments: calls.append(arguments))
    assert main(["report", "run", "--output_dir=~/y"]) == 0
    assert calls == [(["run"], f"{tmp_path}/y", None)]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", ["pretrain --help", "--help", "recipes", "check-data r.yaml", "units gpt2"])
def test_terminals_that_lack_signs(command, encoding, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("model_name_or_path: built-in\noutput_dir: out\ndomains: [{name: bio}, {name: cs}]\n")
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", out)
    try:
        assert main(command.split()) == 0
    except SystemExit as stop:
        assert stop.code == 0
    out.flush()
    assert len(out.buffer.getvalue()) > 100


def test_a_recipe_gives_a_terminal_no_orders(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text('description: "\\e[31mred"')
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert "?[31mred" in printed and "\x1b" not in printed


def test_check_data_knows_first_whether_it_can_write(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "nowhere" / "found.json"):
        assert main(["check-data", "bio_then_cs", "--output", str(path)]) == 2
        assert f"--output {path}: " in capsys.readouterr().err


def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    options = ["--recipe", "bio_then_cs", "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert main(["pretrain", *options, "--accelerator_config", str(pipe)]) == 2
    assert "no mapping, and no file of one" in capsys.readouterr().err
