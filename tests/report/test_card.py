"""The model card of a finished stage, what the walk warns of, and what is pushed to the hub (which is not there)."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from das_lm.cli import main
from das_lm.files import broken_file
from das_lm.measure.results import Results
from das_lm.methods import METHODS
from das_lm.report.card import NOT_PUSHED, model_card
from das_lm.training.config import DASConfig
from das_lm.training.trainer import ContinualTrainer
from tests.helpers import build_tokenizer, random_blocks, tiny_roberta

TOKEN = "hf_aVerySecretToken"


class Hub:
    """Stands in for the hub: what was made, and what every commit holds."""

    def __init__(self):
        self.made, self.commits, self.broken = [], [], None

    def create_repo(self, repo_id, **options):
        if self.broken == "make":
            raise OSError(f"401: the token {options['token']} is not valid")
        self.made.append((repo_id, options))
        name = repo_id if "/" in repo_id else f"somebody/{repo_id}"
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, repo_id, folder_path, commit_message, token, ignore_patterns, revision, **options):
        if self.broken == commit_message:
            raise ConnectionError("the line is dead")
        files = {
            path.relative_to(folder_path).as_posix(): path.read_bytes()
            for path in sorted(Path(folder_path).rglob("*"))
            if path.is_file()
        }
        files = {name: data for name, data in files.items() if not any(fnmatch(name, p) for p in ignore_patterns)}
        self.commits.append((repo_id, commit_message, token, revision, files))


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            huggingface_hub.HfApi, name, lambda api, *args, name=name, **options: getattr(hub, name)(*args, **options)
        )
    return hub


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny model and a recipe of two domains, of which `cs` is measured on text that `bio` trains on."""
    root = tmp_path_factory.mktemp("world")
    tiny_roberta().save_pretrained(root / "model")
    build_tokenizer().save_pretrained(root / "model")
    texts = [" ".join(f"w{(number * step) % 59}" for step in range(1, 20)) for number in range(1, 59)]
    for name, part in (("bio", texts[:30]), ("cs", texts[30:]), ("held_out", texts[25:35])):
        (root / f"{name}.txt").write_text("\n".join(part))
    (root / "recipe.yaml").write_text(
        f"""
model_name_or_path: {root}/model
output_dir: {root}/unused
method: [das, replay]
domains:
  - {{name: bio, data: {root}/bio.txt, held_out: {root}/cs.txt, training: {{weight_decay: 0.125}}}}
  - {{name: cs, data: {root}/cs.txt, held_out: {root}/held_out.txt}}
training: {{max_length: 24, max_steps: 2, per_device_train_batch_size: 4, importance_samples: 8, save_steps: 1,
           disable_tqdm: true, use_cpu: true, report_to: none}}
"""
    )
    return root


def run(world: Path, output: Path, *options: str) -> int:
    return main(["pretrain", "--recipe", str(world / "recipe.yaml"), "--output_dir", str(output), *options])


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    assert run(world, output) == 0
    return output


# ---- the card ------------------------------------------------------------------------------------------------------


def test_every_stage_has_a_card_of_what_was_measured_so_far(finished, world):
    results = Results.load(finished)
    for number, directory in enumerate(("1-bio", "2-cs"), start=1):
        assert broken_file(finished / directory) is None
        card = ModelCard.load(finished / directory / "README.md")
        assert (card.data.library_name, card.data.pipeline_tag, card.data.base_model) == (
            "transformers",
            "fill-mask",
            None,  # a directory
        )
        assert {"das-lm", "das", "replay"} < set(card.data.tags)
        scores = results.stages[number]["scores"]
        told = {(one.dataset_type, one.metric_type): one.metric_value for one in card.data.eval_results}
        assert told == {
            (name, measure): pytest.approx(score[measure], abs=1e-6)
            for name, score in scores.items()
            for measure in ("loss", "accuracy")
        }
        kept = card.text.partition("## What it kept and forgot")[2]
        matrix = [line for line in kept.splitlines() if line.startswith(("| base |", "| bio |", "| cs |"))]
        rows = [line for line in matrix if line.count("|") == 4]
        assert len(rows) == number + 1
        for stage, row in zip(results.stages, rows, strict=False):
            assert all(f"{score['loss']:.3f}" in row for score in stage["scores"].values())
        low, high = results.stages[number]["intervals"]["cs"]["loss"]
        assert f"({low:.3f} to {high:.3f})" in rows[number]
        assert f"stage {number} of 2" in card.text
        assert "`weight_decay` (bio) | 0.125" in card.text
        assert "bio.txt" in card.text and str(world) not in str(card) and str(finished) not in str(card)


def test_the_card_says_how_to_load_the_model(finished, monkeypatch):
    monkeypatch.chdir(finished)
    code = Path("2-cs/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "RobertaForMaskedLM" and len(names["tokenizer"]) == 64


def test_figures_and_changes_have_the_right_sign():
    card = model_card(_results("old", "bio", "cs"), Path("2-cs")).text
    assert "old was never learned: loss 1.000 before training, 1.500 now, 0.500 worse." in card
    assert "bio was learned earlier: loss 2.000 when it was learned (stage 1), 2.250 now, 0.250 worse." in card
    assert "cs was learned last: loss 3.500 before this stage, 2.000 now, 1.500 better." in card
    assert "| backward transfer | -0.2500 |" in card and "| drift of what was never learned | +0.5000 |" in card
    assert "| bio | 1.250, 50.0% | **2.000**, 50.0% | 3.500, 50.0% |" in card


HOSTILE = (
    "<script>alert(1)</script>",
    "a|b",
    "![x](https://example.org/x.png)",
    "`code` *bold* [link](https://example.org) https://example.org $x$",
    "one\n---\n# two\n\nthree: [",
    "&lt;b&gt; \\| <b",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_and_never_markup(name, tmp_path):
    results = _results(name, f"{name} 1", f"{name} 2", model=f"{name}/", device=name, warning=name)
    text = str(model_card(results, tmp_path / "2-cs"))
    assert ModelCard(text).data.eval_results[0].dataset_name == f"held-out text of {name}"
    shown = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").render(ModelCard(text).text)
    plain = (
        MarkdownIt("commonmark")
        .enable("table")
        .render(ModelCard(str(model_card(_results("old", "bio", "cs", warning="w"), tmp_path / "2-cs"))).text)
    )
    for mark in (
        "<script",
        "<img",
        "<a ",
        "<b>",
        "<em>",
        "<h1",
        "<h2",
        "<td",
        "<th",
        "<tr",
        "<li",
        "<hr",
        "<code",
        "<p",
    ):
        assert shown.count(mark) == plain.count(mark), mark
    assert " ".join(name.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in shown


def _results(
    old: str, bio: str, cs: str, model: str = "some/model", device: str = "cpu", warning: str = ""
) -> Results:
    """Two finished stages with round numbers."""
    losses = [[1.0, 3.0, 4.0], [1.25, 2.0, 3.5], [1.5, 2.25, 2.0]]
    stages = [
        {
            "name": name,
            "scores": {
                domain: {"loss": loss, "accuracy": 0.5, "tokens": 10, "documents": 5}
                for domain, loss in zip((old, bio, cs), row, strict=True)
            },
        }
        for name, row in zip(("base", bio, cs), losses, strict=True)
    ]
    recipe = {
        "model_name_or_path": model,
        "domains": [{"name": bio, "data": f"hub:{bio}"}, {"name": cs, "data": [f"/secret/{cs}", "/secret/more.txt"]}],
        "measure": [{"name": old, "data": "built-in"}],
        "method": ["das"],
        "schedule": "sequential",
        "training": {"learning_rate": 1e-4, "importance": "/secret/importance", "hub_model_id": "x", "seed": 7},
    }
    run = {
        "recipe": recipe,
        "documents": {old: 0, bio: 100, cs: 200},
        "versions": {"das_lm": "0.1.0"},
        "device": device,
        "warnings": {cs: [warning]} if warning else {},
    }
    return Results({old: None, bio: 1, cs: 2}, stages, run)


def test_a_card_names_the_hub_and_not_this_machine():
    card = model_card(_results("old", "org/set", "cs"), Path("2-cs"), "somebody/model")
    assert (card.data.base_model, card.data.datasets) == ("some/model", ["org/set"])
    assert 'from_pretrained("somebody/model")' in card.text
    assert "secret" not in str(card) and "hub_model_id" not in str(card)
    assert "One run with seed 7" in card.text


# ---- the walk's warning -------------------------------------------------------------------------------------------


def test_the_walk_warns_of_measured_text_that_is_trained_on_and_a_resumed_one_remembers(
    world, finished, tmp_path, capsys, monkeypatch
):
    warnings = Results.load(finished).run["warnings"]
    assert [line for line in warnings["cs"] if "stand in training text" in line] == warnings["cs"][-1:]
    assert "5 of 10 measured documents" in warnings["cs"][-1]
    assert "5 of 10 measured documents" in (finished / "2-cs" / "README.md").read_text()

    output = tmp_path / "run"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "2-cs")
    data = json.loads((output / "forgetting.json").read_text())
    (output / "forgetting.json").write_text(json.dumps({**data, "stages": data["stages"][:2]}))
    monkeypatch.setattr("das_lm.run.walk.find_leakage", lambda *_: pytest.fail("compared again"))
    assert run(world, output, "--resume") == 0
    assert Results.load(output).run["warnings"] == warnings
    assert (output / "2-cs" / "README.md").read_bytes() == (finished / "2-cs" / "README.md").read_bytes()


# ---- the hub ------------------------------------------------------------------------------------------------------


def test_every_finished_stage_is_one_commit_without_token_training_state_or_training_text(
    world, tmp_path, hub, capsys
):
    output = tmp_path / "my-run"
    assert (
        run(world, output, "--push_to_hub", "--hub_token", TOKEN, "--hub_private_repo", "--save_total_limit", "1") == 0
    )
    assert hub.made == [("my-run", {"token": TOKEN, "private": True, "exist_ok": True})]
    assert [commit[:4] for commit in hub.commits] == [
        ("somebody/my-run", "bio (1 of 2)", TOKEN, None),
        ("somebody/my-run", "cs (2 of 2)", TOKEN, None),
    ]
    for directory, (*_, files) in zip(("1-bio", "2-cs"), hub.commits, strict=True):
        assert set(files) == {
            "README.md",
            "config.json",
            "continual_state.json",
            "importance.safetensors",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert 'from_pretrained("somebody/my-run")' in files["README.md"].decode()
        assert {path.name for path in (output / directory).iterdir()} - set(files) <= set(NOT_PUSHED)
        assert (output / directory / "replay.safetensors").is_file()
        assert broken_file(output / directory) is None
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    assert not [path for path in output.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_the_repository_can_be_named(world, tmp_path, hub):
    options = ["--push_to_hub", "--hub_model_id", "lab/model", "--hub_revision", "try", "--domain", "bio"]
    assert run(world, tmp_path / "run", *options) == 0
    assert hub.made[0][0] == "lab/model"
    assert [commit[1:4] for commit in hub.commits] == [("bio (1 of 1)", None, "try")]


def test_a_hub_that_refuses_is_one_message_before_anything_is_trained(world, tmp_path, hub, capsys):
    hub.broken = "make"
    assert run(world, tmp_path / "run", "--push_to_hub", "--hub_token", TOKEN) == 2
    error = capsys.readouterr().err
    assert "the repository 'run' cannot be opened: 401" in error and "hf auth login" in error and TOKEN not in error
    assert not (tmp_path / "run").exists()


def test_a_push_that_fails_costs_nothing_and_is_tried_again(world, finished, tmp_path, hub, capsys, monkeypatch):
    hub.broken = "cs (2 of 2)"
    output = tmp_path / "run"
    assert run(world, output, "--push_to_hub") == 2
    error = capsys.readouterr().err
    assert "2-cs is saved, but cannot be pushed to 'somebody/run': the line is dead" in error and "--resume" in error
    hub.broken = None
    monkeypatch.setattr(ContinualTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert run(world, output, "--push_to_hub", "--resume") == 0
    assert [commit[1] for commit in hub.commits] == ["bio (1 of 2)", "cs (2 of 2)"]
    assert (Results.load(output).matrix() == Results.load(finished).matrix()).all()


def test_a_trainer_alone_pushes_what_is_finished_without_the_token(tmp_path, hub):
    args = DASConfig(
        output_dir=str(tmp_path / "model"),
        max_steps=2,
        save_steps=1,
        max_length=24,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        push_to_hub=True,
        hub_token=TOKEN,
    )
    blocks = random_blocks(8)
    trainer = ContinualTrainer(
        tiny_roberta(), args, train_dataset=blocks, eval_dataset=blocks, processing_class=build_tokenizer()
    )
    trainer.train()
    assert hub.commits == []
    trainer.push_to_hub()
    ((repository, _, _, _, files),) = hub.commits
    assert repository == "somebody/model"
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= set(files)
    assert not any(TOKEN.encode() in data for data in files.values())
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in files)
    assert {"das-lm", "continual-pretraining"} < set(ModelCard(files["README.md"].decode()).data.tags)


@pytest.mark.parametrize("method", METHODS)
def test_training_text_stays_here(method, tmp_path, hub):
    """Whatever a method keeps of two domains: no pushed file holds a row of them, in no folder of the output."""
    options = {"optim": "sgd", "max_grad_norm": 0.0} if method == "ncl" else {}
    args = DASConfig(
        output_dir=str(tmp_path / "model"),
        max_steps=1,
        max_length=12,
        importance_samples=4,
        memory_size=4,
        scp_projections=2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **options,
    )
    learned, model, kept = [random_blocks(8, seed=seed) for seed in range(2)], tiny_roberta(), METHODS[method]()
    for blocks in learned:
        trainer = ContinualTrainer(model, args, kept, train_dataset=blocks, processing_class=build_tokenizer())
        trainer.train()
    trainer.save_model(str(tmp_path / "model" / "final"))
    trainer.push_to_hub()
    ((*_, files),) = hub.commits
    assert {"README.md", "model.safetensors", "final/model.safetensors", "final/continual_state.json"} <= set(files)
    rows = [np.array(row).tobytes() for blocks in learned for row in blocks["input_ids"]]
    assert rows and not [name for name, data in files.items() if any(row in data for row in rows)]
    here = {p.relative_to(tmp_path / "model").as_posix() for p in (tmp_path / "model").rglob("*") if p.is_file()}
    memory = [kept.file_name, f"final/{kept.file_name}"] if method in ("anchor", "replay", "agem", "gem") else []
    assert sorted(here - set(files)) == sorted(memory)
    for name in memory:
        assert any(row in (tmp_path / "model" / name).read_bytes() for row in rows)
    patterns = [name for name in {path.rsplit("/")[-1] for path in here} if any(fnmatch(name, p) for p in NOT_PUSHED)]
    assert patterns == memory[:1]  # the walk leaves the same out
