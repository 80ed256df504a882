"""What the scripts compute themselves: the numbers of the built-in base model."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedTokenizerFast, RobertaForMaskedLM

from das_lm.data.embedded import BASE_MODEL


def load(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_of_the_base_model_states_what_its_weights_give():
    """It knows the facts of `general` when asked with new sentences, and neither bio's nor cs's."""
    build = load("build_base_model")
    model = RobertaForMaskedLM.from_pretrained(BASE_MODEL, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BASE_MODEL)
    table = [line.strip("| ").split(" | ") for line in (BASE_MODEL / "README.md").read_text().splitlines()]
    for domain, least, most in (("general", 0.75, 1.0), ("bio", 0.0, 0.2), ("cs", 0.0, 0.2)):
        row = next(row for row in table if row[0] == domain)
        choice = build.cloze_scores(model, tokenizer, domain)["choice"]
        assert least <= choice <= most
        assert float(row[1].rstrip("%")) / 100 == pytest.approx(choice, abs=0.011)  # two questions of 240
        assert float(row[-1]) == pytest.approx(build.held_out_loss(model, tokenizer, domain), abs=0.005)
