"""Two real processes train as one does on the whole batch: the same importance, parameters and held-out numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from das_lm import DASConfig, DASTrainer
from tests.distributed import run_in_two_processes
from tests.helpers import build_tokenizer, random_blocks, tiny_roberta

#: Without dropout: the views differ by drops through the gates, which are addressed by example.
RUNS = {
    "with contrast": {},
    "no gradient through the prior": {"contrast_prior_gradient": False},
    "accumulated, no contrast": {"contrast_weight": 0.0, "gradient_accumulation_steps": 2},
}
SCRIPT = """
import sys
import torch
from tests.distributed.test_trainer import train

torch.set_num_threads(1)
train(sys.argv[1], batch_size=4)
"""


def counted(prediction):
    """Of the predictions of all processes: how many there are, and how many are right."""
    hits = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"predictions": len(hits), "hits": hits.mean()}


def train(directory, batch_size):
    """Make all runs; the main process writes down what came out."""
    for name, options in RUNS.items():
        args = DASConfig(
            output_dir=f"{directory}/output",
            max_steps=4,
            max_length=12,
            importance_samples=13,
            learning_rate=0.05,
            optim="sgd",
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=4,
            **options,
        )
        trainer = DASTrainer(
            model=tiny_roberta(),
            args=args,
            train_dataset=random_blocks(40),
            eval_dataset={"bio": random_blocks(7, seed=9)},
            processing_class=build_tokenizer(),
            domain="bio",
            compute_metrics=counted,
        )
        trainer.train()
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            importance = trainer.methods[0].importance
            tensors = {f"values.{key}": value for key, value in importance.values.items()}
            tensors |= {f"last.{key}": value for key, value in importance.by_domain[-1].items()}
            tensors |= {f"parameters.{key}": value.detach().clone() for key, value in trainer.model.named_parameters()}
            save_file(tensors, f"{directory}/{name}.safetensors")
            logs = [entry for entry in trainer.state.log_history if "loss" in entry]
            facts = {"metrics": metrics, "logs": logs, "processes": args.world_size}
            Path(directory, f"{name}.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Directories of the runs in this process with batches of 8, and in two others with 4 each."""
    directory = tmp_path_factory.mktemp("distributed")
    one, two = directory / "one", directory / "two"
    one.mkdir()
    two.mkdir()
    run_in_two_processes(SCRIPT, directory, two)
    train(one, batch_size=8)
    return one, two


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name, outputs):
    one, two = (json.loads((output / f"{name}.json").read_text()) for output in outputs)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["logs"]) == 4
    for ours, theirs in zip(one["logs"], two["logs"], strict=True):
        for part in ("loss", "grad_norm", "loss_mlm", *(["loss_contrast"] if "loss_contrast" in ours else [])):
            assert theirs[part] == pytest.approx(ours[part], rel=1e-4), part
    for figure in ("loss", "accuracy", "tokens", "documents", "predictions", "hits"):
        assert two["metrics"][f"eval_bio_{figure}"] == pytest.approx(one["metrics"][f"eval_bio_{figure}"], rel=1e-4)
    one, two = (load_file(output / f"{name}.safetensors") for output in outputs)
    assert one.keys() == two.keys() and {key.split(".")[0] for key in one} == {"values", "last", "parameters"}
    for key, value in one.items():
        tolerance = 1e-4 if key.startswith("parameters") else 1e-5
        message = f"{key}: {(two[key] - value).abs().max()}"
        assert torch.allclose(two[key], value, rtol=0, atol=tolerance), message
