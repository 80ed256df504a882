"""Two real processes learn two domains with a method as one does on the whole batches: parameters and state agree."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from das_lm import ContinualTrainer, DASConfig
from das_lm.methods import METHODS
from tests.distributed import run_in_two_processes
from tests.helpers import build_tokenizer, random_blocks, tiny_roberta

METHODS_HERE = ["ewc", "mas", "scp", "si", "rwalk", "replay", "lwf", "ema", "anchor", "anchor cached"]
SCRIPT = """
import sys
import torch
from tests.distributed.test_methods import train

torch.set_num_threads(1)
train(sys.argv[1], batch_size=4)
"""


def train(directory, batch_size):
    """Learn two domains with each method; the main process writes down what came out."""
    for name in METHODS_HERE:
        model, method = tiny_roberta(), METHODS[name.partition(" ")[0]]()
        for domain in range(2):
            args = DASConfig(
                output_dir=f"{directory}/output",
                max_steps=4,
                max_length=12,
                importance_samples=13,
                importance_batch_size=4,
                learning_rate=0.02,
                lr_scheduler_type="constant",
                optim="sgd",
                penalty_weight=0.1,
                fisher="empirical",
                scp_projections=3,
                rwalk_interval=2,
                replay_ratio=0.5,
                memory_size=10,
                self_replay_sweeps=2,
                anchor_teacher="cached" if "cached" in name else "auto",
                drift_budget=0.01 if "cached" in name else None,
                use_cpu=True,
                disable_tqdm=True,
                report_to=[],
                save_strategy="no",
                per_device_train_batch_size=batch_size,
            )
            trainer = ContinualTrainer(
                model,
                args,
                method,
                train_dataset=random_blocks(40, seed=domain),
                processing_class=build_tokenizer(),
                domain=f"domain {domain}",
            )
            trainer.train()
        seen = trainer.tokens_seen.state()["tokens_seen"]
        if trainer.is_world_process_zero():
            tensors = {f"parameters.{key}": value.detach().clone() for key, value in model.named_parameters()}
            tensors |= {f"state.{key}": value.clone() for key, value in method.state_dict().items()}
            tensors |= {f"seen.{source}": torch.tensor(count) for source, count in seen.items()}
            save_file(tensors, f"{directory}/{name}.safetensors")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Directories of the runs in this process with batches of 8, and in two others with 4 each."""
    directory = tmp_path_factory.mktemp("methods")
    one, two = directory / "one", directory / "two"
    one.mkdir()
    two.mkdir()
    run_in_two_processes(SCRIPT, directory, two)
    train(one, batch_size=8)
    return one, two


@pytest.mark.parametrize("name", METHODS_HERE)
def test_two_processes_equal_one(name, outputs):
    one, two = (load_file(output / f"{name}.safetensors") for output in outputs)
    assert one.keys() == two.keys()
    for key, value in one.items():
        if key.endswith("key.bias"):
            continue  # no gradient but rounding: it shifts all scores of a query alike
        tolerance = 1e-4 * float(value.double().abs().max())
        torch.testing.assert_close(two[key], value, rtol=0, atol=tolerance, msg=lambda text, k=key: f"{k}: {text}")
