"""What a model writes is drawn from its own distributions, as these are where it is trained and measured."""

import pytest
import torch

from das_lm.errors import UserError
from das_lm.methods.writing import Writer
from tests.helpers import build_tokenizer
from tests.methods.test_anchor import MODELS, anchor_of, trainer_of
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


def test_nobody_wrote_the_opening_of_a_chat(tmp_path):
    """Predictions of the template's own words are not looked at, in training and for the budget alike."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w1 w2 <s> {{ m['content'] }} w3 {% endfor %}"
    trainer = trainer_of(tmp_path, MODELS["causal"](), processing_class=tokenizer, memory_size=16)
    trainer.remembered.begin_domain()
    anchor = anchor_of(trainer)
    anchor.begin_domain()
    batch = anchor._masked["self"].batch([(0, 0), (1, 0)])
    opening = tokenizer("w1 w2 <s>", add_special_tokens=False)["input_ids"]
    assert batch["input_ids"][:, :3].tolist() == [opening] * 2
    assert (batch["labels"][:, :2] == -100).all() and (batch["labels"][:, 2:-1] != -100).all()
    tokenizer.chat_template = tokenizer.chat_template.replace("w1 w2", "w1 w2 w3 w4 w5 w6 w7 w8")
    with pytest.raises(UserError, match="max_length: 8 leaves no room"):
        Writer(trainer_of(tmp_path / "b", MODELS["causal"](), processing_class=tokenizer, max_length=8)).rows(2)
