"""An encoder without its LM head gets a new one, which learns alone before all else."""

import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaModel

from das_lm.cli import main
from das_lm.measure.results import Results
from das_lm.run import walk as pretrain
from das_lm.training.trainer import ContinualTrainer
from tests.helpers import VOCABULARY, WORDS, build_tokenizer

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 40,
}  # fmt: skip


def save_model(model, directory: Path) -> Path:
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    save_model(BertModel(BertConfig(**SIZES)), root / "encoder")
    for number, name in enumerate(("general", "bio", "cs")):
        draw = random.Random(number)
        lines = {" ".join(draw.choices(WORDS[:16], k=14)) for _ in range(60)}
        (root / f"{name}.txt").write_text("\n".join(sorted(lines)))
    (root / "recipe.yaml").write_text(
        f"""
model_name_or_path: {root}/encoder
output_dir: {root}/unused
domains: [{{name: bio, data: {root}/bio.txt}}, {{name: cs, data: {root}/cs.txt}}]
measure: [{{name: general, data: {root}/general.txt}}]
new_lm_head: 30
training: {{max_length: 24, max_steps: 3, per_device_train_batch_size: 8, importance_samples: 8, learning_rate: 1e-2,
           disable_tqdm: true, use_cpu: true, report_to: none}}
"""
    )
    return root


def run_recipe(world: Path, output: Path, *options: str) -> int:
    return main(["pretrain", "--recipe", str(world / "recipe.yaml"), "--output_dir", str(output), *options])


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    assert run_recipe(world, output) == 0
    return output


def test_the_head_learns_alone_and_is_tied(world, finished):
    encoder = load_file(world / "encoder" / "model.safetensors")
    base = AutoModelForMaskedLM.from_pretrained(finished / "0-base")
    assert isinstance(base, BertForMaskedLM)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    kept = {name.removeprefix("bert."): one for name, one in base.state_dict().items() if name.startswith("bert.")}
    assert len(kept) > 20 and all(torch.equal(one, encoder[name]) for name, one in kept.items())
    assert base.cls.predictions.bias.abs().sum() > 0.1  # it began at 0


def test_base_is_measured_with_it_on_text_that_it_did_not_learn(world, finished):
    results = Results.load(finished)
    assert [stage["checkpoint"] for stage in results.stages] == ["0-base", "1-bio", "2-cs"]
    assert results.run["documents"]["general"] == 54  # the head's; 6 are held out
    assert results.stages[0]["scores"]["general"]["documents"] == 6
    assert results.stages[0]["scores"]["general"]["loss"] < math.log(VOCABULARY) - 0.25  # 16 of the words are there
    card = (finished / "2-cs" / "README.md").read_text()
    assert "encoder came without an LM head" in card and "for 30 steps on **general**" in card


def test_measuring_the_run_further_changes_nothing(world, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(ContinualTrainer, "measure", lambda *_: pytest.fail("all of it was measured before"))
    before = Results.load(finished).stages
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 0
    after = Results.load(tmp_path / "run").stages
    assert [stage["scores"] for stage in after] == [stage["scores"] for stage in before]


@pytest.mark.parametrize("stopped", ["train_head", "copy_whole", "record", "_save"])
def test_a_run_that_was_interrupted_ends_the_same(world, finished, tmp_path, monkeypatch, stopped):
    where = pretrain.Walk if stopped == "record" else pretrain
    output, original, calls = tmp_path / "run", getattr(where, stopped), []

    def stop(*args, **kwargs):
        calls.append(args)
        if stopped == "_save" and len(calls) < 3:  # the base in the temporary directory, and bio
            return original(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, stopped, stop)
        assert run_recipe(world, output) == 130
    started = (output / "recipe.yaml").exists()
    assert started == (stopped != "train_head")
    assert run_recipe(world, output, *["--resume"] * started) == 0
    for stage in ("0-base", "1-bio", "2-cs"):
        ours, theirs = (load_file(one / stage / "model.safetensors") for one in (output, finished))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [s["scores"] for s in Results.load(output).stages] == [s["scores"] for s in Results.load(finished).stages]


def test_a_damaged_base_is_told_on_resume(world, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "0-base" / "config.json").write_text("{}")
    shutil.rmtree(tmp_path / "run" / "2-cs")
    assert run_recipe(world, tmp_path / "run", "--resume") == 2
    assert "0-base, the base model with its new head, is damaged: config.json" in capsys.readouterr().err


def test_an_overwritten_run_takes_its_base_along(world, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    assert run_recipe(world, tmp_path / "run", "--overwrite_output_dir", "--new_lm_head", "1") == 0
    ours, theirs = (load_file(one / "0-base" / "model.safetensors") for one in (tmp_path / "run", finished))
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)


REFUSED = {
    "no steps": (["--new_lm_head", "0"], "new_lm_head: 0 must be at least 1"),
    "a head": (["--model_name_or_path", "{world}/whole"], "has its LM head; leave new_lm_head out"),
    "one matrix": (["--model_name_or_path", "{world}/llama"], "tie_word_embeddings"),
    "adapters alone": (["--peft", '{"adapters": "apart"}'], "write adapters: merge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(world, tmp_path, capsys, case):
    options, message = REFUSED[case]
    if case == "a head":
        save_model(BertForMaskedLM(BertConfig(**SIZES)), world / "whole")
    if case == "one matrix":
        save_model(LlamaModel(LlamaConfig(**SIZES, tie_word_embeddings=False)), world / "llama")
    options = [option.replace("{world}", str(world)) for option in options]
    assert run_recipe(world, tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_an_encoder_is_refused_with_the_words_to_write(world, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text((world / "recipe.yaml").read_text().replace("new_lm_head: 30", ""))
    assert main(["pretrain", "--recipe", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]) == 2
    assert "or begin with a new one (--new_lm_head STEPS)" in capsys.readouterr().err


def test_a_recipe_without_general_text_is_refused(world, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(
        "\n".join(line for line in (world / "recipe.yaml").read_text().splitlines() if not line.startswith("measure"))
    )
    assert main(["pretrain", "--recipe", str(tmp_path / "recipe.yaml")]) == 2
    assert "new_lm_head: a new head learns from general text before all else" in capsys.readouterr().err
