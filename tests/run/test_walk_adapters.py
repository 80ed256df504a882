"""Adapters in a walk over domains."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, LlamaForCausalLM

from das_lm import ContinualTrainer
from das_lm.cli import main
from das_lm.measure.end_task import EndTask
from das_lm.measure.results import Results
from tests.helpers import Interrupted, refused, run_recipe, save_model, tiny_roberta
from tests.model.helpers import ADAPTED_METHODS, ROWS, assert_close, assert_equal, batch_of, tiny_llama, weights_of


def walk(world: Path, output: Path, how: str, *options: str, **peft) -> Results:
    adapter = {"r": 2, "target_modules": ["query", "value", "intermediate.dense"], "adapters": how, **peft}
    assert run_recipe(world, output, "--peft", json.dumps(adapter), *options) == 0
    return Results.load(output)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> dict[str, Path]:
    """Uninterrupted runs of DAS over two domains."""
    root = tmp_path_factory.mktemp("adapters")
    for how in ("merge", "stack", "apart"):
        walk(world, root / how, how)
    return {how: root / how for how in ("merge", "stack", "apart")}


def loaded(world: Path, directory: Path):
    """A stage as its card says: by PEFT, or by transformers alone."""
    if (directory / "adapter_config.json").is_file():
        base = AutoModelForMaskedLM.from_pretrained(world / "model")
        return PeftModel.from_pretrained(base, directory).merge_and_unload()
    return AutoModelForMaskedLM.from_pretrained(directory)


def test_merged_stages_are_whole_models_with_their_adapter_beside(world, runs):
    source = world / "model"
    for stage in (runs["merge"] / "1-bio", runs["merge"] / "2-cs"):
        names = {path.name for path in stage.iterdir()}
        assert {"model.safetensors", "config.json", "adapter", "importance.safetensors", "README.md"} <= names
        assert {path.suffix for path in stage.rglob("*") if path.is_file()} == {".json", ".safetensors", ".md"}
        assert {path.name for path in (stage / "adapter").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        again = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(source), stage / "adapter")
        assert_equal(weights_of(again.merge_and_unload()), weights_of(AutoModelForMaskedLM.from_pretrained(stage)))
        source = stage


@pytest.mark.parametrize("how", ["stack", "apart"])
def test_other_stages_are_adapters_of_the_base_model(world, runs, how):
    for stage in (runs[how] / "1-bio", runs[how] / "2-cs"):
        names = {path.name for path in stage.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
        assert not names & {"model.safetensors", "config.json", "adapter"}
        assert {path.suffix for path in stage.iterdir()} == {".json", ".safetensors", ".md"}
        config = json.loads((stage / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(world / "model")
        assert AutoTokenizer.from_pretrained(stage).mask_token == "<mask>"
        plain = AutoModelForMaskedLM.from_pretrained(stage)  # transformers looks for the base model by itself
        batch = {name: value for name, value in batch_of(plain).items() if name != "labels"}
        with torch.no_grad():
            ours = loaded(world, stage).eval()(**batch).logits
            torch.testing.assert_close(plain.eval()(**batch).logits, ours, rtol=0, atol=1e-5)


def test_three_ways_from_one_domain_to_the_next(world, runs, tmp_path):
    """The first domain is the same in all. Stacked, the second is what it is merged; apart, it is as without the
    first."""
    first = tensors(runs["merge"] / "1-bio" / "adapter")
    assert_equal(first, tensors(runs["stack"] / "1-bio"))
    assert_equal(first, tensors(runs["apart"] / "1-bio"))
    second = {how: weights_of(loaded(world, runs[how] / "2-cs")) for how in runs}
    assert_close(second["merge"], second["stack"], 2e-5)
    assert max((second["merge"][name] - w).abs().max() for name, w in second["apart"].items()) > 1e-3
    stacked = tensors(runs["stack"] / "2-cs")
    for name, tensor in first.items():
        assert torch.equal(stacked[name][:2] if ".lora_A." in name else stacked[name][:, :2], tensor)
    walk(world, tmp_path / "naive", "apart", "--method", "naive")
    walk(world, tmp_path / "alone", "apart", "--method", "naive", "--domain", "cs")
    assert_equal(tensors(tmp_path / "naive" / "2-cs"), tensors(tmp_path / "alone" / "1-cs"))


def test_what_is_measured_is_what_was_saved_and_importance_accumulates(runs):
    matrices = {how: Results.load(run) for how, run in runs.items()}
    for results in matrices.values():
        assert results.stages[2]["importance_of"] == ["general", "bio", "cs"]
        assert results.run["recipe"]["peft"]["r"] == 2
    merge, stack, apart = (matrices[how].matrix() for how in ("merge", "stack", "apart"))
    assert (merge[:2] == apart[:2]).all() and abs(merge - stack).max() < 1e-4 and (merge[2] != apart[2]).all()


@pytest.mark.parametrize("use_rslora", [True, False])
def test_stacking_adds_up(world, tmp_path, use_rslora):
    """Ranks and factors by pattern, with √r, and with biases and a module that are trained as a whole."""
    peft = {
        "use_rslora": use_rslora,
        "rank_pattern": {"query": 3},
        "alpha_pattern": {"value": 5},
        "bias": "lora_only",
        "modules_to_save": ["lm_head.dense"],
    }
    runs = [tmp_path / how for how in ("merge", "stack")]
    for run in runs:
        walk(world, run, run.name, "--method", "naive", **peft)
    one, two = (weights_of(loaded(world, run / "2-cs")) for run in runs)
    assert_close(one, two, 2e-5)
    start = weights_of(AutoModelForMaskedLM.from_pretrained(world / "model"))
    query = "roberta.encoder.layer.0.attention.self.query"
    for name in (f"{query}.weight", f"{query}.bias", "lm_head.dense.weight"):
        assert (one[name] - start[name]).abs().max() > 1e-4, name
    config = json.loads((tmp_path / "stack" / "2-cs" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["rank_pattern"] == {"query": 6}


@pytest.mark.parametrize("how", ["merge", "stack", "apart"])
@pytest.mark.parametrize("where", ["train cs", "measure bio", "save cs"])
def test_a_resumed_walk_equals_the_uninterrupted_one(world, runs, tmp_path, monkeypatch, how, where):
    what, domain = where.split()
    name = {"train": "training_step", "measure": "measure", "save": "save_model"}[what]
    original, calls = getattr(ContinualTrainer, name), []

    def interrupt(self, *args, **kwargs):
        here = self.domain == domain or what == "measure"
        here &= self.state.global_step == 3 if what == "train" else not kwargs.get("_internal_call")
        calls.append(here)
        if sum(calls) == (2 if what == "measure" else 1) and here:  # the base model is measured before
            raise Interrupted
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ContinualTrainer, name, interrupt)
    output = tmp_path / "run"
    peft = json.dumps({"r": 2, "target_modules": ["query", "value", "intermediate.dense"], "adapters": how})
    with pytest.raises(Interrupted):
        run_recipe(world, output, "--peft", peft)
    monkeypatch.undo()
    assert run_recipe(world, output, "--peft", peft, "--resume") == 0
    for path in runs[how].rglob("[0-9]*/**/*.safetensors"):
        assert_equal(load_file(path), load_file(output / path.relative_to(runs[how])))
    assert (Results.load(output).matrix() == Results.load(runs[how]).matrix()).all()


@pytest.mark.parametrize("method", ADAPTED_METHODS)
def test_every_other_method_over_two_domains(method, world, tmp_path):
    """What it keeps goes from domain to domain; the model learns, and what is no target stays as it was."""
    small = {"memory_size": 8, "self_replay_sweeps": 2, "replay_ratio": 0.5, "ema_decay": 0.5}
    options = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    walk(world, tmp_path / "run", "merge", "--method", method, *options)
    before, *stages = (
        weights_of(AutoModelForMaskedLM.from_pretrained(path))
        for path in (world / "model", tmp_path / "run" / "1-bio", tmp_path / "run" / "2-cs")
    )
    for after in stages:
        for name, weight in after.items():
            is_target = name.endswith("weight") and any(n in name for n in ("query", "value", "intermediate.dense"))
            assert torch.equal(weight, before[name]) != is_target, name
        before = after
    kept = {path.name for path in (tmp_path / "run" / "2-cs").glob("*.safetensors")} - {"model.safetensors"}
    files = {"das": ["importance"], "self_replay": ["selfreplay"], "anchor": ["anchor", "remembered"]}
    files |= {name: [name] for name in ("agem", "gate", "gem", "replay", "lwf")}
    assert kept == {f"{name}.safetensors" for name in files.get(method, ())}


def test_self_replay_teaches_by_the_base_model_in_the_second_domain_too(world, tmp_path):
    options = ["--method", "self_replay", "--self_replay_target", "distributions", "--memory_size", "8"]
    walk(world, tmp_path / "run", "merge", *options, "--self_replay_sweeps", "1", "--replay_ratio", "0.5")
    first, second = (load_file(tmp_path / "run" / stage / "selfreplay.safetensors") for stage in ("1-bio", "2-cs"))
    assert_equal(first, second)
    name = "roberta.encoder.layer.0.attention.self.query.base_layer.weight"
    base = AutoModelForMaskedLM.from_pretrained(world / "model").state_dict()
    assert torch.equal(second[f"teacher.base_model.model.{name}"], base[name.replace("base_layer.", "")])


@pytest.mark.parametrize("how", ["merge", "stack", "apart"])
def test_evaluating_such_runs(world, runs, tmp_path, how, monkeypatch):
    """All that was measured is read; end-tasks start from the sum of model and adapter."""
    run, seen = shutil.copytree(runs[how], tmp_path / how), []
    monkeypatch.setattr(ContinualTrainer, "measure", lambda *_: pytest.fail("measured again"))

    def fine_tune(path, task, config):
        seen.append(weights_of(AutoModelForMaskedLM.from_pretrained(path)))
        AutoTokenizer.from_pretrained(path)
        return EndTask(task, [0], [1], torch.zeros(1, len(task.test), dtype=torch.long).numpy(), len(task.train))

    monkeypatch.setattr("das_lm.run.evaluate.fine_tune", fine_tune)
    task = tmp_path / "task"
    task.mkdir()
    for split in ("train", "dev", "test"):
        rows = [{"text": f"w{number} w{number + 1}", "label": str(number % 2)} for number in range(6)]
        (task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["evaluate", "--run", str(run), "--end_task", f"bio={task}", "--end_task_seeds", "0"]) == 0
    assert (Results.load(run).matrix() == Results.load(runs[how]).matrix()).all()
    for weights, stage in zip(seen[1:], ("1-bio", "2-cs"), strict=True):
        assert_close(weights, weights_of(loaded(world, runs[how] / stage)), 1e-7)


def test_any_adapters_are_checkpoints_and_a_base_model(world, runs, tmp_path):
    run = runs["stack"]
    options = ["--checkpoint", f"base={world}/model", "--checkpoint", f"bio={run}/1-bio", "--max_length", "24"]
    options += ["--domain", f"old={world}/old.txt", "--output_dir", str(tmp_path / "measured")]
    assert main(["evaluate", *options]) == 0
    ours = Results.load(tmp_path / "measured").matrix()
    assert ours[:, 0] == pytest.approx(Results.load(run).matrix()[:2, 0], abs=1e-9)
    assert run_recipe(world, tmp_path / "next", "--model_name_or_path", str(run / "2-cs"), "--domain", "bio") == 0
    assert Results.load(tmp_path / "next").matrix()[0] == pytest.approx(Results.load(run).matrix()[2, :2], abs=1e-6)
    assert Results.load(tmp_path / "next").stages[1]["importance_of"] == ["general", "bio", "cs", "bio"]


def test_the_card_says_how_to_load_an_adapter(world, runs):
    card = (runs["stack"] / "2-cs" / "README.md").read_text()
    assert 'PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained("model"), "2-cs")' in card
    assert "library_name: peft" in card and "| `peft.r` | 2 |" in card
    card = (runs["merge"] / "2-cs" / "README.md").read_text()
    assert "library_name: transformers" in card and "import PeftModel" not in card


# ---- QLoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_qlora(world, tmp_path):
    """Adapters of a model of 4 bits: the walk, and measuring again."""
    save_model(tiny_roberta(hidden_size=64, intermediate_size=128), tmp_path / "base")
    options = ["--model_name_or_path", str(tmp_path / "base"), "--learning_rate", "1e-2"]
    results = walk(world, tmp_path / "run", "apart", *options, load_in_4bit=True)
    matrix = results.matrix()
    assert matrix[1, 1] < matrix[0, 1] and matrix[2, 2] < matrix[0, 2]
    assert results.stages[2]["importance_of"] == ["general", "bio", "cs"]
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 0
    assert (Results.load(tmp_path / "run").matrix() == matrix).all()


def test_causal_models_walk_too(world, tmp_path):
    save_model(tiny_llama(), tmp_path / "llama")
    adapter = json.dumps({"r": 2, "target_modules": ROWS["llama"], "adapters": "stack"})
    options = ["--model_name_or_path", str(tmp_path / "llama"), "--peft", adapter, "--max_length", "16"]
    assert run_recipe(world, tmp_path / "run", *options) == 0
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "llama"), tmp_path / "run" / "2-cs")
    assert model.active_peft_config.r == 4 and model.active_peft_config.task_type == "CAUSAL_LM"


# ---- what is refused -----------------------------------------------------------------------------------------------


def _deeper(directory: Path, world: Path) -> str:
    save_model(tiny_roberta(num_hidden_layers=1), world)
    return "another model"


def _wider(directory: Path, world: Path) -> str:
    save_model(tiny_roberta(hidden_size=16), world)
    return "does not fit its model"


def _gone(directory: Path, world: Path) -> str:
    shutil.rmtree(world)
    return "cannot be loaded"


def _truncated(directory: Path, world: Path) -> str:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return "broken"


def _nameless(directory: Path, world: Path) -> str:
    path = directory / "adapter_config.json"
    path.write_text(path.read_text().replace(json.dumps(str(world)), "null"))
    return "base_model_name_or_path"


@pytest.mark.parametrize("damage", [_deeper, _wider, _gone, _truncated, _nameless])
def test_an_adapter_without_its_model(world, runs, tmp_path, capsys, damage):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(world / "model", base)
    shutil.copytree(runs["stack"] / "2-cs", adapter)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(world / "model"), str(base)))
    phrase = damage(adapter, base)
    assert phrase in refused(world, tmp_path / "run", capsys, "--model_name_or_path", str(adapter))


def test_an_adapter_of_another_model(world, runs, tmp_path, capsys):
    other = save_model(tiny_roberta(seed=1), tmp_path / "other")
    options = ["--checkpoint", f"base={other}", "--checkpoint", f"bio={runs['stack']}/1-bio"]
    options += ["--domain", f"old={world}/old.txt", "--output_dir", str(tmp_path / "measured"), "--max_length", "24"]
    assert main(["evaluate", *options]) == 2
    error = capsys.readouterr().err
    assert f"is of another model: of '{world}/model', not of '{other}'" in error
    assert not (tmp_path / "measured" / "forgetting.json").exists()
    options = ["--model_name_or_path", str(runs["stack"] / "2-cs"), "--peft", '{"adapters": "stack"}']
    assert "is an adapter itself" in refused(world, tmp_path / "run", capsys, *options)
