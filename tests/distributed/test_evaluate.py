"""Measuring under two real processes gives what one gives, and one of them writes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from das_lm.cli import main
from das_lm.measure.results import Results
from tests.helpers import ROOT


def test_two_processes_measure_what_one_does(finished, probes, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(finished, tmp_path / name)
        shutil.rmtree(tmp_path / name / "measured")
    options = [*probes[:2], "--pseudo_perplexity", "2"]
    assert main(["evaluate", "--run", str(tmp_path / "one"), *options]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts" / "evaluate_forgetting.py"), "--run_dir", str(tmp_path / "two"), *options]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("forgetting rate") == 1
    one, two = (Results.load(tmp_path / name) for name in ("one", "two"))
    for here, there in zip(one.stages, two.stages, strict=True):
        assert here["cloze"] == there["cloze"]
        for key in ("scores", "pseudo"):
            for domain, score in here[key].items():
                assert there[key][domain] == pytest.approx(score, rel=1e-6)
    assert json.loads((tmp_path / "two" / "forgetting.json").read_text())["summary"]["loss"] == pytest.approx(
        one.summary()["loss"], abs=1e-6
    )


def test_two_processes_share_the_examples_of_lm_eval(tmp_path):
    pytest.importorskip("lm_eval")
    options = ["--checkpoint", "base=built-in-causal", "--domain", "bio", "--lm_eval", "das_lm_bio", "--limit", "13"]
    assert main(["evaluate", *options, "--use_cpu", "true", "--output_dir", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts" / "evaluate_forgetting.py"), *options, "--output_dir", str(tmp_path / "two")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (Results.load(tmp_path / name).stages[0]["lm_eval"]["das_lm_bio"] for name in ("one", "two"))
    assert one == two and one["examples"] == 13
