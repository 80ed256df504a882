"""What a model says at a few places of held-out text, against the model itself."""

import numpy as np
import pytest
import torch

from das_lm.measure.results import Results
from das_lm.run import samples
from tests.helpers import WORDS, build_tokenizer, tiny_roberta
from tests.training.helpers import trainer_of

TEXT = [" ".join(np.random.default_rng(seed).choice(WORDS, size=9)) for seed in range(6)]


def test_the_guesses_are_those_of_the_model(tmp_path):
    run = trainer_of(tmp_path, model=tiny_roberta(0.5), held_out={"bio": [{"text": text} for text in TEXT]})
    windows, tokenizer = run.eval_dataset["bio"], build_tokenizer()
    run.processing_class = tokenizer
    places = samples.of(run, {"bio": windows})["bio"]
    assert run.model.training and len(places) == samples.PLACES
    run.model.eval()
    for part, place in enumerate(places, 1):
        row = windows[len(windows) * part // 3]
        with torch.no_grad():
            probabilities = run.model(torch.tensor(row["input_ids"])[None]).logits[0].softmax(-1)
        at = [n for n, label in enumerate(row["labels"]) if label >= 0 and tokenizer.decode([label]) == place["right"]]
        assert row["input_ids"][at[0]] == tokenizer.mask_token_id  # the model does not see it
        best = probabilities[at[0]].topk(3)
        assert [token for token, _ in place["guesses"]] == [
            samples._text(tokenizer, [token]) for token in best.indices.tolist()
        ]
        assert [share for _, share in place["guesses"]] == pytest.approx(best.values.tolist(), abs=6e-4)
        whole = f"{place['before']} {place['right']} {place['after']}".split()
        same = [sum(s in (t, "…") for s, t in zip(whole, text.split(), strict=True)) for text in TEXT]
        assert max(same) >= 8  # a token may have been replaced by another one


def test_every_stage_is_asked_the_same(finished):
    base, *others = [stage["samples"] for stage in Results.load(finished).stages]
    assert list(base) == ["old", "bio", "cs"] and len(others) == 2
    for domain, places in base.items():
        for one in others:
            assert [(p["before"], p["right"], p["after"]) for p in one[domain]] == [
                (p["before"], p["right"], p["after"]) for p in places
            ]
        shares = [share for place in places for _, share in place["guesses"]]
        assert all(0 <= share <= 1 for share in shares)
    assert others[0] != base
