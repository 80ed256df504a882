"""What a model writes is drawn from its own distributions, as these are where it is trained and measured."""

import pytest
import torch

from das_lm.methods.writing import Writer
from tests.methods.test_anchor import trainer_of
from tests.model.helpers import tiny_gpt2, tiny_llama


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_every_token_is_drawn_from_what_training_predicts_there(build, separate, tmp_path, monkeypatch):
    """With a separator that is often drawn; the probabilities of each draw are compared with a pass over the row."""
    model = build()
    trainer = trainer_of(tmp_path, model, separate_documents=separate, max_length=24)
    separator = trainer.processing_class.sep_token_id
    drawn, multinomial = [], torch.multinomial

    def draw(p, count, **options):
        drawn.append(p.clone())
        weighted = p.clone()
        weighted[:, separator] += 0.3  # many documents
        return multinomial(weighted, count, **options)

    monkeypatch.setattr(torch, "multinomial", draw)
    rows = torch.stack([row["input_ids"] for row in Writer(trainer).rows(4)])
    assert (rows[:, 1:-1] == separator).any()
    with torch.no_grad():
        batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        logits = model.eval()(**trainer.criterion.inputs(**batch)).logits
    given = rows.shape[1] - len(drawn)  # tokens that are not drawn
    forbidden = drawn[0][0] == 0
    for step, p in enumerate(drawn):
        expected = logits[:, given + step - 1].masked_fill(forbidden, -torch.inf).softmax(-1)
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-6)
