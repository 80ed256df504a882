"""What a run shows of itself: lines instead of dictionaries, and no progress bars where nobody watches."""

import re

from das_lm.measure.results import Results
from das_lm.run.progress import in_short
from tests.helpers import run_recipe


def test_a_run_in_a_file_is_lines(world, tmp_path, capfd):
    options = ["--disable_tqdm", "false", "--logging_steps", "2", "--eval_strategy", "steps", "--eval_steps", "3"]
    assert run_recipe(world, tmp_path / "run", *options) == 0
    printed, bars = capfd.readouterr()
    assert "{'" not in printed and "it/s]" not in bars and "batch/s]" not in bars
    assert re.search(r"^model .* parameters method ", " ".join(printed.split()))  # of a long path, on two lines
    assert re.search(r"^cost .* 10 steps in all", printed, re.M)
    assert re.search(r"^2/6   loss \d+\.\d{3}   learning rate .* left$", printed, re.M)
    assert re.search(r"^3/6   old \d+\.\d{3} [↑↓]\d+\.\d{3}   bio .*[↑↓].*cs .*[↑↓]", printed, re.M)
    assert printed.count("In short: gain ") == 1
    assert max(map(len, printed.splitlines()[:8])) <= 80


def test_in_short():
    scores = [{"old": {"loss": a}, "bio": {"loss": b}} for a, b in ((1.0, 3.0), (1.25, 2.5))]
    stages = [{"name": name, "scores": one, "seconds": 5.0} for name, one in zip(("base", "bio"), scores, strict=True)]
    results = Results({"old": None, "bio": 1}, stages)
    line = "In short: gain +0.500   drift +0.250   training took 5 s"
    assert in_short(results, None) == line  # of no recipe, nothing can be said of plain training
    assert in_short(results, results) == (
        f"{line}\nBeside plain training of the same model, with the same text and steps: gain +0.500 against +0.500, "
        "drift +0.250 against +0.250."
    )
