"""What must not happen: code that runs out of a file that was only read, files elsewhere, secrets in files."""

import ast
import contextlib
import json
import os
import pickle
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from peft import LoraConfig

from das_lm import DASConfig
from das_lm.classic.benchmark import benchmark
from das_lm.cli import main
from das_lm.data.domains import Domain
from das_lm.errors import UserError
from das_lm.files import seal
from das_lm.model.adapters import with_adapter
from das_lm.report.page import write_report
from das_lm.run.evaluate import evaluate_checkpoints
from das_lm.run.recipe_file import load_recipe
from das_lm.run.sweep import plan
from das_lm.training.trainer import ContinualTrainer
from tests.fuzz.harness import Begun, nothing_trains
from tests.helpers import build_tokenizer, random_blocks, run_recipe, tiny_roberta

ROOT = Path(__file__).parents[2]
SECRET = "hf_ThisTokenIsASecret0123456789"

# ---- the source ----------------------------------------------------------------------------------------------------

EXECUTES = re.compile(
    r"(eval|exec|__import__|os\.system|os\.popen|(pickle|cPickle|dill|joblib|marshal|shelve)\.\w+|yaml\.(unsafe|full)_\w+)"
)


def _dangerous(source: str) -> list[str]:
    """The calls in a source that run code out of data."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name, given = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        if (
            EXECUTES.fullmatch(name)
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False")
            or (name.startswith("yaml.") and given.get("Loader", "yaml.SafeLoader") != "yaml.SafeLoader")
            or (name in ("yaml.load", "yaml.load_all", "yaml.compose", "yaml.parse") and "Loader" not in given)
            or given.get("shell", "False") != "False"
            or given.get("trust_remote_code") == "True"
        ):
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


def test_nothing_in_the_package_runs_code_out_of_data():
    sources = [*(ROOT / "das_lm").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    assert len(sources) > 50
    for path in sources:
        assert not _dangerous(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    "line",
    [
        *("pickle.load(f)", "torch.load(p)", "torch.load(p, weights_only=False)", "yaml.load(t, Loader=yaml.Loader)"),
        *("yaml.load(t, yaml.Loader)", "eval(x)", "subprocess.run(x, shell=True)", "np.load(p, allow_pickle=True)"),
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
    ],
)
def test_the_look_at_the_source_sees(line):
    assert _dangerous(line)
    assert not _dangerous("model.eval(), re.compile(x), torch.load(p, weights_only=True), yaml.safe_load(t)")


# ---- a finished run: what it holds, and what it does not ---------------------------------------------------------


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run with a token on the command line and in the environment, its report, and all that it said."""
    output, said = tmp_path_factory.mktemp("finished") / "run", tmp_path_factory.mktemp("said") / "text"
    options = "--max_steps 2 --logging_steps 1 --report_to tensorboard --log_level debug --method das ewc replay"
    with (
        open(said, "w", encoding="utf-8") as file,
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        patch.setenv("HF_TOKEN", f"{SECRET}env")
        verbosity = transformers.utils.logging.get_verbosity()
        assert run_recipe(world, output, *options.split(), "--hub_token", SECRET) == 0
        transformers.utils.logging.set_verbosity(verbosity)
        write_report([output])
    return output, said


def test_a_finished_run_holds_no_pickle(finished):
    output, _ = finished
    files = [path for path in output.rglob("*") if path.is_file()]
    for stage in ("1-bio", "2-cs"):
        names = {path.suffix for path in files if path.parent == output / stage}
        assert names == {".safetensors", ".json", ".md"}
    plain = {".safetensors", ".json", ".yaml", ".md", ".csv", ".html", ".png", ".svg"}
    for path in files:
        assert path.suffix in plain or (path.name.startswith("events.out.tfevents") and "tensorboard" in path.parts)
        assert path.read_bytes()[:2] not in (b"PK", *(bytes([0x80, protocol]) for protocol in range(6)))
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    assert any(path.name.startswith("events") for path in files) and any(path.suffix == ".svg" for path in files)


def _assert_no_token(*places: Path) -> None:
    files = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    assert files
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def test_a_token_is_written_nowhere(finished, world, tmp_path, capfd, monkeypatch):
    _assert_no_token(*finished)
    monkeypatch.setenv("HF_TOKEN", f"{SECRET}env")
    given = {"hub_token": SECRET, "max_length": 24, "use_cpu": True}
    evaluate_checkpoints(
        {"base": str(world / "model")}, [f"bio={world}/bio.txt"], tmp_path / "measured", training=given
    )
    recipe = load_recipe(world / "recipe.yaml", {"training": {"hub_token": SECRET}})
    assert SECRET not in recipe.to_yaml()
    assert main(["pretrain", "--recipe", str(world / "recipe.yaml"), "--print_recipe", "--hub_token", SECRET]) == 0
    assert run_recipe(world, tmp_path / "x", "--hub_token", SECRET, "--max_steps", "ten") == 2
    (tmp_path / "said").write_text("".join(capfd.readouterr()))
    _assert_no_token(tmp_path)


@pytest.mark.parametrize(
    "at",
    [
        "training: {hub_token: TOKEN}",
        "measure: [{name: general, training: {hub_token: TOKEN}}]",
        "training: {lr_scheduler_kwargs: {hub_token: TOKEN}}",
        "units: {a: [{api_token: TOKEN}]}",
        "token: TOKEN",
    ],
)
def test_a_recipe_file_is_no_place_for_a_token(tmp_path, at):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: built-in\noutput_dir: x\ndomains: [{{name: bio}}]\n{at.replace('TOKEN', SECRET)}"
    )
    with pytest.raises(
        UserError, match="recipe.yaml:4: .*token: a recipe is no place for a secret; .*hf auth login"
    ) as told:
        load_recipe(path)
    assert SECRET not in str(told.value)


@pytest.mark.parametrize(
    "entry",
    [f"naive: hub_token={SECRET}", f"naive: hub_token = {SECRET}", f"naive: learning_rate=1e-4 x_token={SECRET}"],
)
def test_a_sweep_is_no_place_for_a_token(world, tmp_path, entry, capsys):
    given = ["--recipe", str(world / "recipe.yaml"), "--sweep", entry, "--output_dir", str(tmp_path / "out")]
    assert main(["sweep", *given]) == 2
    error = capsys.readouterr().err
    assert "token: a sweep is no place for a secret" in error and SECRET not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token=", SECRET],
        ["--hub_token", "x", SECRET],
        ["--hub-token=", SECRET],
        ["--hub_token", "x", f"-{SECRET}"],
        ["--seed", SECRET, "--hub-token", "x"],
        [f"--hub_token={SECRET}\0"],
    ],
)
def test_a_token_in_the_wrong_place_is_not_repeated(world, words, capsys):
    assert main(["pretrain", "--recipe", str(world / "recipe.yaml"), *words]) == 2
    error = capsys.readouterr().err
    assert SECRET[1:] not in error
    assert any(
        words in error for words in ("write --hub", "not UTF-8", "invalid int value: '…'", "explicit argument '…'")
    )


def test_no_file_holds_the_token_at_any_moment(tmp_path, monkeypatch):
    """Whatever is written and removed again stays here."""
    args = DASConfig(
        tmp_path, max_length=12, max_steps=2, save_steps=1, use_cpu=True, report_to="none", hub_token=SECRET
    )
    model = with_adapter(tiny_roberta(), LoraConfig(r=2), 0)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    trainer = ContinualTrainer(model, args, train_dataset=random_blocks(40), processing_class=build_tokenizer())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    _assert_no_token(tmp_path)


def test_small_models_take_no_token(tmp_path):
    with pytest.raises(UserError, match="hub_token: is of no use"):
        benchmark("split", methods=["naive"], options={"hub_token": SECRET}, output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- code in files that are read ---------------------------------------------------------------------------------


class Touch:
    """Pickled: a call that makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def interrupted(world, tmp_path_factory):
    """A run that stopped in its first domain, after a checkpoint."""

    class Interrupted(Exception):
        pass

    def stop(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise Interrupted
        return step(self, *args, **kwargs)

    step, output = ContinualTrainer.training_step, tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interrupted):
        patch.setattr(ContinualTrainer, "training_step", stop)
        run_recipe(world, output)
    return output


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_not_executed(world, interrupted, tmp_path, file, capsys):
    """Not even in one whose manifest is right; and it is told in one message."""
    output, trap = shutil.copytree(interrupted, tmp_path / "run"), tmp_path / "executed"
    (checkpoint,) = output.rglob("checkpoint-2")
    assert (checkpoint / file).is_file()
    torch.save(Touch(trap), checkpoint / file)
    seal(checkpoint)
    assert run_recipe(world, output, "--resume") == 2
    assert not trap.exists()
    assert "checkpoint-2" in capsys.readouterr().err
    with pytest.raises(FileExistsError):  # the trap works
        trap.mkdir()
        pickle.loads(pickle.dumps(Touch(trap)))


EVIL = """
import os
os.mkdir(PLACE)
from transformers import PreTrainedTokenizerFast, RobertaConfig as Config, RobertaForMaskedLM as Model
Tokenizer = PreTrainedTokenizerFast
"""


@pytest.mark.parametrize("model_type", ["roberta", "evil"])
def test_code_beside_a_model_is_not_run(world, tmp_path, model_type, monkeypatch):
    """Of a type that transformers knows, its own code is used; of another, the model is refused."""
    model, trap = shutil.copytree(world / "model", tmp_path / "model"), tmp_path / "executed"
    (model / "evil.py").write_text(EVIL.replace("PLACE", repr(str(trap))))
    for file, more in (
        ("config.json", {"AutoConfig": "evil.Config", "AutoModelForMaskedLM": "evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}),
    ):
        settings = json.loads((model / file).read_text()) | {"auto_map": more}
        if file == "config.json":
            settings["model_type"] = model_type
        (model / file).write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks, where nothing is said
    with nothing_trains(), contextlib.suppress(Begun):
        status = 0
        status = run_recipe(world, tmp_path / "out", "--model_name_or_path", str(model))
    assert status == (0 if model_type == "roberta" else 2)
    if model_type == "evil":
        assert main(["units", str(model)]) == 2
        measured = ["--output_dir", str(tmp_path / "measured"), "--domain", f"bio={world}/bio.txt"]
        assert main(["evaluate", "--checkpoint", f"base={model}", *measured]) == 2
    assert not trap.exists()


def test_a_file_cannot_let_code_run(world, finished, tmp_path, capsys):
    """Neither a recipe nor that of a run; what the command line allowed is not kept for another."""
    key = "trust_remote_code: true\n"
    (tmp_path / "recipe.yaml").write_text((world / "recipe.yaml").read_text() + key)
    with pytest.raises(
        UserError, match="trust_remote_code: a file cannot let code run; leave it out, and give --trust"
    ):
        load_recipe(tmp_path / "recipe.yaml")
    trusting = load_recipe(tmp_path / "recipe.yaml", {"trust_remote_code": True})
    assert trusting.trust_remote_code and "trust_remote_code" not in trusting.to_yaml()

    run, trap = shutil.copytree(finished[0], tmp_path / "run"), tmp_path / "executed"
    (run / "1-bio" / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\nraise ImportError")
    settings = json.loads((run / "1-bio" / "config.json").read_text())
    settings |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForMaskedLM": "evil.Model"}, "model_type": "evil"}
    (run / "1-bio" / "config.json").write_text(json.dumps(settings))
    seal(run / "1-bio")
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + key)
    assert main(["evaluate", "--run", str(run)]) == 2
    assert "1-bio" in capsys.readouterr().err and not trap.exists()
    with contextlib.suppress(Exception):
        main(["evaluate", "--run", str(run), "--trust_remote_code"])
    assert trap.exists()  # the trap works


def test_a_recipe_runs_no_code(tmp_path):
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"):
        (tmp_path / "recipe.yaml").write_text(f"x: {tag} ['{tmp_path}/executed']\n")
        with pytest.raises(UserError, match="broken YAML"):
            load_recipe(tmp_path / "recipe.yaml")
    assert not (tmp_path / "executed").exists()


# ---- paths ---------------------------------------------------------------------------------------------------------

OUTSIDE = [
    "../x",
    "/abs",
    "..",
    ".",
    ".hidden",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "a" * 65,
    "",
    " ",
    "~",
    "-x",
    "ü",
    "con:x",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_name_of_a_domain_is_no_path(name, tmp_path):
    with pytest.raises(UserError):
        Domain(name, "x.txt")
    with pytest.raises(UserError):
        evaluate_checkpoints({"base": "built-in"}, [f"{name}=x.txt"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_runs_of_a_sweep_stay_in_its_directory(world, tmp_path):
    entries = ["naive: run_name=../../x,/abs,..,a/b", "das: importance=../../../x"]
    runs = plan(world / "recipe.yaml", entries, [0], tmp_path / "sweep")
    assert len(runs) == 5
    for directory, recipe in runs.items():
        assert directory.resolve().is_relative_to(tmp_path / "sweep") and recipe.output_dir == str(directory)
        assert len(directory.relative_to(tmp_path / "sweep").parts) == 2


def test_what_a_person_wrote_is_text_in_a_report(finished, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "run")
    data, hostile = (
        json.loads((output / "forgetting.json").read_text()),
        "<script>alert(1)</script><img src=x onerror=y>",
    )
    data["run"]["recipe"]["description"] = data["run"]["device"] = data["stages"][1]["checkpoint"] = hostile
    data["run"]["warnings"] = {hostile: [hostile]}
    data["stages"][1]["name"] = hostile
    (output / "forgetting.json").write_text(json.dumps(data))
    page = write_report([output], title=hostile).read_text(encoding="utf-8")
    assert "<script" not in page and "<img" not in page and page.count("&lt;script&gt;") > 5
    for figure in (output / "figures").glob("*.svg"):
        assert "<script" not in figure.read_text(encoding="utf-8")


# ---- dependencies --------------------------------------------------------------------------------------------------


def test_every_dependency_has_a_lower_bound_and_a_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    needed = [Requirement(text) for text in [*project["dependencies"], *(text for extra in extras for text in extra)]]
    needed = [one for one in needed if one.name != project["name"]]  # an extra that names the others
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    tested = {line.partition("==")[0]: line.partition("==")[2] for line in lines}
    assert all(re.fullmatch(r"[a-z0-9_-]+==[0-9][0-9a-z.]*", line) for line in lines)
    for one in needed:
        assert any(bound.operator in (">=", "~=", "==", ">") for bound in one.specifier), f"{one} has no lower bound"
        if one.name not in ("wandb", "bitsandbytes", "liger-kernel"):  # which the tests do without
            assert one.specifier.contains(tested[one.name]), f"{one}, but constraints.txt has {tested[one.name]}"
