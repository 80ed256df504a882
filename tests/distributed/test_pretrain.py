"""The walk under two real processes: one of them writes, both wait, and the result is whole."""

import os
import subprocess
import sys

from transformers import AutoModelForMaskedLM

from das_lm.files import broken_file
from das_lm.measure.results import Results
from tests.helpers import ROOT


def test_two_processes_walk_a_recipe(world, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts" / "continual_pretrain.py"), "--recipe", str(world / "recipe.yaml")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    results = Results.load(tmp_path / "run")
    assert results.run["processes"] == 2 and len(results.stages) == 3
    assert result.stdout.count("forgetting rate") == 1
    for stage in ("1-bio", "2-cs"):
        assert broken_file(tmp_path / "run" / stage) is None
        AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / stage)
