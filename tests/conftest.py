"""Fixtures of several rooms, and what holds for all tests. The tiny world that they are of is in `helpers.py`."""

import gc
import json
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on a hub; without this, each miss is retried for long

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.helpers import WORDS, build_tokenizer, run_recipe, save_model, tiny_roberta, write_texts

#: Files that take longest come first, so that no process waits for another in the end.
LONGEST = (
    "end_to_end/test_command_line.py",
    "distributed/test_fsdp.py",
    "distributed",
    "end_to_end",
    "methods",
    "fuzz",
)


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        path = item.path.as_posix()
        return next((number for number, part in enumerate(LONGEST) if f"tests/{part}" in path), len(LONGEST))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Sums in one order, and no fight over cores with what else runs."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("das_lm.run.processes.use_all_cores", lambda: None)  # it would hold for all that follows
        yield


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage():
    """The Trainer collects garbage at the end of every run, which takes longer than these runs where it looks through
    all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _environment_as_it_was():
    """`TrainingArguments(torch_compile=True)` asks for compilation through the environment, for all that follows; and
    `datasets.Dataset.map` in several processes leaves a copy in place of `os.environ`, which rich does not read."""
    environment, before = os.environ, {name for name in os.environ if name.startswith("ACCELERATE_")}
    yield
    os.environ = environment  # noqa: B003 (the very object that was there)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        if name not in before:
            del os.environ[name]


@pytest.fixture(scope="session", autouse=True)
def _no_report_of_every_run():
    """Drawing takes longer than these runs; `tests/end_to_end` sees the report that ends a recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("das_lm.run.live.finish", lambda output: output / "report.html")
        patch.setattr("das_lm.run.live.draw", lambda *progress: None)
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny model, three domains of text that use different words, and a recipe."""
    root = tmp_path_factory.mktemp("world")
    save_model(tiny_roberta(dropout=0.1), root / "model")
    write_texts(root)
    (root / "recipe.yaml").write_text(
        f"""
model_name_or_path: {root}/model
output_dir: {root}/unused
domains:
  - {{name: bio, data: {root}/bio.txt, training: {{max_steps: 6}}}}
  - {{name: cs, data: {root}/cs.txt}}
measure:
  - {{name: old, data: {root}/old.txt}}
training: {{max_length: 24, max_steps: 4, per_device_train_batch_size: 4, importance_samples: 8, save_steps: 2,
           learning_rate: 1e-3, disable_tqdm: true, use_cpu: true, report_to: none}}
"""
    )
    return root


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """The output directory of an uninterrupted run."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert run_recipe(world, output) == 0
    return output


@pytest.fixture(scope="module")
def probes(tmp_path_factory) -> list[str]:
    """Questions about bio, and an end-task: does a text hold w1?"""
    root, draw = tmp_path_factory.mktemp("probes"), random.Random(0)
    with open(root / "questions.jsonl", "w") as file:
        for _ in range(12):
            words = draw.sample(WORDS[:20], k=6)
            row = {"text": f"{words[0]} ___ {words[1]}", "answer": words[2], "choices": words[2:]}
            print(json.dumps(row), file=file)
        print(json.dumps({"text": "no blank", "answer": "w1"}), file=file)
    for split, count in (("train", 24), ("dev", 8), ("test", 12)):
        with open(root / f"{split}.jsonl", "w") as file:
            for number in range(count):
                words = draw.sample(WORDS[2:30], k=6)
                words[draw.randrange(6)] = WORDS[number % 2]
                print(json.dumps({"text": " ".join(words), "label": f"c{number % 2}"}), file=file)
    tuning = ["--end_task_seeds", "0", "1", "--end_task_epochs", "2", "--end_task_learning_rate", "1e-3"]
    return ["--cloze", f"bio={root}/questions.jsonl", "--end_task", f"bio.first={root}", *tuning]
