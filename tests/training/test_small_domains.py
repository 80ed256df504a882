"""Domains with next to nothing in them: each is learned, or ends in one message before anything is written."""

import json

import pytest
from safetensors.torch import load_file

from das_lm.cli import main
from das_lm.methods import METHODS
from tests.helpers import build_tokenizer
from tests.methods.helpers import NEEDS, SMALL
from tests.training.helpers import run_of, trainer_of
from tests.training.test_trainer import random_blocks, tiny_roberta

LONG = "w1 w2 w3 w4 w5 w6 w7 w8 w9"
OTHER = "w9 w8 w7 w6 w5 w4 w3 w2 w1"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_roberta(dropout=0.1).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def learn(model, tmp_path, capsys):
    """Learns a domain of the documents, and gives status, what was written to stderr, and the output directory."""

    def learned(documents: list[str], domain: str = "", training: str = "") -> tuple[int, str, object]:
        (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
        (tmp_path / "other.jsonl").write_text(json.dumps({"text": OTHER}) + "\n")
        (tmp_path / "recipe.yaml").write_text(
            f"""
model_name_or_path: {model}
output_dir: {tmp_path}/run
domains:
  - {{name: tiny, data: {tmp_path}/text.jsonl, {domain.replace("HERE", str(tmp_path))}}}
training: {{max_length: 12, max_steps: 2, importance_samples: 8, disable_tqdm: true,
           use_cpu: true, report_to: none, per_device_train_batch_size: 64, {training}}}
"""
        )
        status = main(["pretrain", "--recipe", str(tmp_path / "recipe.yaml")])
        bars_and_more = capsys.readouterr().err.replace("\r", "\n").splitlines()
        message = "\n".join(line for line in bars_and_more if "it/s" not in line and "examples" not in line)
        return status, message.strip(), tmp_path / "run"

    return learned


@pytest.mark.parametrize(
    ("documents", "domain", "training"),
    [
        pytest.param([LONG, OTHER], "", "", id="fewer blocks than a batch"),
        pytest.param([LONG, OTHER] * 9, "", "gradient_accumulation_steps: 8", id="fewer than are accumulated"),
        pytest.param([LONG], "held_out: HERE/other.jsonl", "", id="one document"),
        pytest.param(["w1", "w2 w3"], "min_characters: 1", "", id="a block of two tokens"),
        pytest.param(["w1"], "min_characters: 1, held_out: HERE/other.jsonl", "", id="a block of one token"),
        pytest.param([LONG, OTHER, "w1", ""], "held_out: 0.99", "", id="one document is left to learn"),
        pytest.param([LONG, OTHER], "held_out: 1.0e-6", "", id="a share of less than a document"),
        pytest.param([LONG] * 5 + [OTHER], "", "", id="the same document over and over"),
    ],
)
def test_is_learned(learn, documents, domain, training):
    """In a whole run of `das` with all its parts: one row has no negatives, and a block may be shorter than others."""
    status, message, run = learn(documents, domain, training)
    assert (status, message) == (0, "")
    results = json.loads((run / "forgetting.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == ["base", "tiny"]
    assert results["stages"][1]["step"] == 2
    for file in ("model.safetensors", "importance.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(run / "1-tiny" / file).values())


@pytest.mark.parametrize(
    ("documents", "domain", "training", "message"),
    [
        pytest.param(
            [], "", "", "text.jsonl: the file is empty; remove it from the list or fill it", id="an empty file"
        ),
        pytest.param(
            ["", " "], "", "", "no text is left: 0 rows without text, 2 documents shorter", id="blank documents"
        ),
        pytest.param(["w1", "w2"], "", "", "shorter than min_characters (20)", id="all too short"),
        pytest.param(
            [LONG], "", "", "a single document, so none can be split off; give held_out a path", id="one document"
        ),
        pytest.param([LONG, LONG], "", "", "a single document, so none can be split off", id="the same one twice"),
        pytest.param([OTHER], "held_out: HERE/other.jsonl", "", "every document is also held out", id="all held out"),
        pytest.param(
            [LONG, OTHER],
            "held_out: HERE/other.jsonl, min_characters: 27",
            "",
            "no text is left: 0 rows without text, 1 documents shorter",
            id="held out, and too short",
        ),
        pytest.param(
            [LONG, OTHER],
            "",
            "dataloader_drop_last: true",
            "dataloader_drop_last: domain 'tiny' has 1 rows, fewer than the 64 of a batch",
            id="the only batch is left out",
        ),
    ],
)
def test_is_refused(learn, documents, domain, training, message):
    status, said, run = learn(documents, domain, training)
    assert status == 2 and said.startswith("das-lm: error: ") and len(said.splitlines()) == 1
    assert message in said.replace("no held-out text", "no text")
    assert not run.exists()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_with_one_row(name, tmp_path):
    """One block, then another, in batches of four."""
    options = {**SMALL, "max_steps": 2, "learning_rate": 1e-3, **NEEDS.get(name, {})}
    first = run_of(tmp_path, method=name, train=random_blocks(1), **options)
    second = trainer_of(
        tmp_path, first.model, method=first.methods, train=random_blocks(1, seed=1), domain="cs", **options
    )
    second.train()
    assert all(parameter.isfinite().all() for parameter in second.model.parameters())
    assert all(tensor.isfinite().all() for tensor in second.methods[0].state_dict().values())
