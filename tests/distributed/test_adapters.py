"""Two real processes walk over two domains with adapters as one does on the whole batches."""

import json

import pytest
import torch
from safetensors.torch import load_file

from das_lm.cli import main
from das_lm.measure.results import Results
from tests.distributed import run_in_two_processes
from tests.helpers import save_model, tiny_roberta

SCRIPT = """
import sys
import torch
from das_lm.cli import main

torch.set_num_threads(1)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", ["merge", "stack"])
def test_two_processes_equal_one(how, world, tmp_path):
    model = save_model(tiny_roberta(), tmp_path / "model")
    peft = {"r": 2, "target_modules": ["query", "value", "intermediate.dense"], "adapters": how}
    options = ["pretrain", "--recipe", str(world / "recipe.yaml"), "--model_name_or_path", str(model)]
    options += ["--peft", json.dumps(peft), "--optim", "sgd", "--learning_rate", "0.5", "--output_dir"]
    run_in_two_processes(SCRIPT, tmp_path, *options, tmp_path / "two", "--per_device_train_batch_size", "2")
    assert main([*options, str(tmp_path / "one")]) == 0
    name = "2-cs/model.safetensors" if how == "merge" else "2-cs/adapter_model.safetensors"
    one, two = (load_file(tmp_path / run / name) for run in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-4, msg=lambda text, k=key: f"{k}: {text}")
    matrices = [Results.load(tmp_path / run).matrix() for run in ("one", "two")]
    assert matrices[0] == pytest.approx(matrices[1], abs=1e-4)
    assert abs(matrices[0][2] - matrices[0][0]).max() > 0.1  # the runs have learned something
