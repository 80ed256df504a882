"""New words in the walk: the tokenizer and the embeddings grow before a domain, and the measures stay comparable."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from das_lm.cli import main
from das_lm.data.built_in import BASE_MODEL
from das_lm.measure.results import Results
from das_lm.training.trainer import ContinualTrainer
from tests.helpers import tiny_roberta, write_texts

WORDS = {
    "old": ["morning", "market", "village", "council", "weather", "station", "football", "season", "winter", "report"],
    "bio": [
        "hepatoblastoma",
        "cardiomyopathies",
        "glomerulonephritis",
        "immunofluorescence",
        "thrombocytopenia",
        "enzyme",
    ],
    "cs": [
        "hyperparameterization",
        "backpropagating",
        "autoregressiveness",
        "decompilation",
        "virtualizations",
        "memory",
    ],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer that cuts long words into pieces, and a recipe that adds words twice."""
    root = tmp_path_factory.mktemp("words")
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    tiny_roberta(vocab_size=len(tokenizer), initializer_range=0.02).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write_texts(root, WORDS, lengths=(4, 8))
    (root / "recipe.yaml").write_text(
        f"""
model_name_or_path: {root}/model
output_dir: {root}/unused
domains:
  - {{name: bio, data: {root}/bio.txt, add_tokens: 4}}
  - {{name: cs, data: {root}/cs.txt, add_tokens: 3}}
measure: [{{name: old, data: {root}/old.txt}}]
training: {{max_length: 32, max_steps: 4, per_device_train_batch_size: 4, importance_samples: 8, save_steps: 2,
           learning_rate: 1e-3, disable_tqdm: true, use_cpu: true, report_to: none}}
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


def test_every_stage_has_its_words(world, finished):
    before = len(AutoTokenizer.from_pretrained(world / "model"))
    for stage, added, domain in (("1-bio", 4, "bio"), ("2-cs", 7, "cs")):
        tokenizer = AutoTokenizer.from_pretrained(finished / stage)
        assert len(tokenizer) == before + added
        model = AutoModelForMaskedLM.from_pretrained(finished / stage)
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings >= before + added
        text = " ".join(WORDS[domain])
        assert len(tokenizer(f" {text}")["input_ids"]) < len(
            AutoTokenizer.from_pretrained(world / "model")(f" {text}")["input_ids"]
        )
        assert tokenizer.decode(tokenizer(f" {text}", add_special_tokens=False)["input_ids"]).strip() == text


def test_what_was_measured_stays_comparable(finished):
    """The same documents: all of their text is covered by either tokenizer, by fewer tokens of the new one."""
    results = Results.load(finished)
    scores = [stage["scores"] for stage in results.stages]
    for domain in results.domains:
        assert len({score[domain]["documents"] for score in scores}) == 1
    assert scores[1]["bio"]["tokens"] < scores[0]["bio"]["tokens"]
    assert all(score["bio"]["loss_per_byte"] > 0 for score in scores)
    assert "loss" in results.intervals


def test_interrupted_equals_uninterrupted(world, finished, tmp_path, monkeypatch):
    step = ContinualTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.domain == "cs" and self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ContinualTrainer, "training_step", interrupted)
        assert run_recipe(world, tmp_path / "run") == 130
    assert run_recipe(world, tmp_path / "run", "--resume") == 0
    for file in ("model.safetensors", "importance.safetensors"):
        left, right = (load_file(directory / "2-cs" / file) for directory in (tmp_path / "run", finished))
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert (Results.load(tmp_path / "run").matrix() == Results.load(finished).matrix()).all()


def test_evaluate_reads_every_stage_with_its_own_tokenizer(finished, tmp_path):
    """What the walk measured is what is measured again from the checkpoints alone."""
    assert main(["evaluate", "--run", str(finished), "--output_dir", str(tmp_path / "again")]) == 0
    walked, again = (json.loads((d / "forgetting.json").read_text()) for d in (finished, tmp_path / "again"))
    assert [stage["scores"] for stage in walked["stages"]] == [stage["scores"] for stage in again["stages"]]


@pytest.mark.parametrize(
    ("options", "message"), [(["--method", "ewc"], "add_tokens: ewc remembers single parameters"), ([], "add_tokens")]
)
def test_what_is_refused(world, tmp_path, capsys, options, message):
    recipe = (world / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe if options else recipe.replace("add_tokens: 4", "add_tokens: -4"))
    command = ["pretrain", "--recipe", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run"), *options]
    assert main(command) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_embeddings_in_slices_do_not_grow(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("das_lm.run.reading.is_sharded", lambda model: True)
    assert run_recipe(world, tmp_path / "run") == 2
    assert "domain 'bio': add_tokens: fsdp has cut the embeddings" in capsys.readouterr().err
