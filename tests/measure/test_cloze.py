"""Cloze questions: scores against a naive loop, candidates, and every question that is skipped."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, RobertaForMaskedLM

from das_lm.data.built_in import BASE_MODEL
from das_lm.errors import UserError
from das_lm.measure.cloze import Question, Questions, cloze_accuracy, load_questions
from tests.helpers import BOS, EOS, MASK, VOCABULARY, WORDS, build_tokenizer, tiny_roberta


def random_questions(count, seed=0):
    """Texts of different lengths with four candidates of one to three tokens, two of which begin alike."""
    draw = random.Random(seed)
    questions = []
    for _ in range(count):
        before, after = (" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in range(2))
        one, two, three, four, five = draw.sample(WORDS, k=5)
        choices = [f"{one} {two}", f"{one} {three} {two}", four, f"{five} {four}"]
        questions.append(Question(f"{before} ", f" {after}", draw.choice(choices), tuple(choices)))
    return Questions(questions, {})


def naive_right(question, score):
    scores = {choice: score(question, choice) for choice in question.choices}
    return all(scores[question.answer] > value for choice, value in scores.items() if choice != question.answer)


def tokens(text):
    return build_tokenizer()(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def masked_score(model, question, candidate, left_to_right=True, mean=True):
    """One forward pass for every token of one candidate."""
    before, answer, after = (tokens(part) for part in (question.before, candidate, question.after))
    total = 0.0
    for done in range(len(answer)):
        seen = answer[:done] if left_to_right else []
        ids = [BOS, *before, *seen, *[MASK] * (len(answer) - len(seen)), *after, EOS]
        logits = model(input_ids=torch.tensor([ids])).logits[0, 1 + len(before) + done]
        total += logits.log_softmax(-1)[answer[done]].item()
    return total / len(answer) if mean else total


def test_a_masked_model_scores_left_to_right_as_a_naive_loop():
    model, questions = tiny_roberta().eval(), random_questions(40)

    def expected(**options):
        return [
            naive_right(question, lambda *args: masked_score(model, *args, **options)) for question in questions.usable
        ]

    right = expected()
    for batch_size in (1, 3, 64):
        cloze = cloze_accuracy(model, build_tokenizer(), questions, batch_size=batch_size)
        assert cloze.right.tolist() == right
        assert cloze.candidates.tolist() == [4] * 40
    assert expected(left_to_right=False) != right != expected(mean=False)  # the questions tell them apart


@pytest.mark.parametrize("adds_start", [True, False])
def test_a_causal_model_scores_the_whole_text(adds_start):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=40, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    ).eval()
    tokenizer, questions = build_tokenizer(), random_questions(30)
    if not adds_start:  # as GPT-2's own
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        questions.usable.append(Question("", f" {WORDS[0]}", WORDS[1], (WORDS[1], WORDS[2])))
    tokenizer.pad_token = None

    @torch.no_grad()
    def score(question, candidate):
        ids = [BOS, *tokens(question.before + candidate + question.after), *([EOS] if adds_start else [])]
        ids = torch.tensor([ids])
        return -model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)

    cloze = cloze_accuracy(model, tokenizer, questions, batch_size=3)
    assert cloze.right.tolist() == [naive_right(question, score) for question in questions.usable]
    assert 0 < cloze.accuracy < 1


def test_a_token_may_begin_with_the_space_before_the_answer():
    """As SentencePiece has it: the same ids, other characters."""
    words = {f"▁{word}" if word in WORDS else word: index for word, index in build_tokenizer().get_vocab().items()}
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.model = models.WordLevel(words, unk_token="<unk>")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert tokenizer("w1 w2", return_offsets_mapping=True)["offset_mapping"][2] == (2, 5)
    questions = random_questions(20)
    expected = cloze_accuracy(tiny_roberta(), build_tokenizer(), questions)
    np.testing.assert_array_equal(cloze_accuracy(tiny_roberta(), tokenizer, questions).right, expected.right)


def test_the_base_model_knows_general_facts_and_no_others():
    """Byte-level tokens: an answer takes the space before it along, and some have several tokens."""
    model = RobertaForMaskedLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    for domain, least, most in (("general", 0.7, 1.0), ("bio", 0.0, 0.3)):
        questions = load_questions(f"built-in:{domain}")
        cloze = cloze_accuracy(model, tokenizer, dataclasses.replace(questions, usable=questions.usable[:50]))
        assert least <= cloze.accuracy <= most
        assert cloze.skipped == {}


def test_answers_of_the_file_are_the_candidates_where_there_are_no_choices():
    usable = [Question("w1 ", " w2", answer) for answer in ("w3", "w4 w5", "w3", "nobody")]
    usable.append(Question("w1 ", " w2", "w3", ("w3", "w9")))
    cloze = cloze_accuracy(tiny_roberta(), build_tokenizer(), Questions(usable, {"no blank": 2}))
    assert cloze.candidates.tolist() == [2, 2, 2, 2]  # w3 and "w4 w5"; "nobody" is an unknown word
    assert cloze.chance == 0.5
    assert cloze.skipped == {"no blank": 2, "answer or choice with a word that the tokenizer does not know": 1}
    assert cloze.right[0] == cloze.right[2] != cloze.right[1]  # one text, and one best candidate


def test_measures_are_plain_numbers():
    measures = cloze_accuracy(tiny_roberta(), build_tokenizer(), random_questions(8)).measures()
    assert json.loads(json.dumps(measures)) == measures
    assert measures["right"] / measures["asked"] == measures["accuracy"]
    assert (measures["asked"], measures["candidates"], measures["chance"]) == (8, 4, 0.25)


def test_what_cannot_be_asked_of_a_model_is_counted():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("#", "")
    fits = "w1 " * 35  # and <s>, an answer, </s>: the 38 positions of the model
    usable = [
        Question(fits, "", "w1", ("w1", "w2")),
        Question(fits, "", "w1", ("w1", "w2 w3")),
        Question("w1 ", " w2", "#", ("#", "w1")),
        Question("w1 ", " w2", "w1", ("w1", "w2", "#")),
        Question("w1 ", " w2", "w1"),
    ]
    cloze = cloze_accuracy(tiny_roberta(), tokenizer, Questions(usable, {}))
    assert len(cloze.right) == 1
    assert cloze.skipped == {
        "longer than the model reads": 1,
        "answer or choice without a token": 2,
        "a single choice": 1,
    }
    with pytest.raises(UserError, match="not one can be asked .skipped: 1 no blank, 1 longer than the model reads"):
        cloze_accuracy(tiny_roberta(), tokenizer, Questions(usable[1:2], {"no blank": 1}))


def test_a_tie_is_not_right():
    model = tiny_roberta()
    torch.nn.init.zeros_(model.lm_head.decoder.weight)
    torch.nn.init.zeros_(model.lm_head.decoder.bias)
    assert cloze_accuracy(model, build_tokenizer(), random_questions(5)).right.tolist() == [False] * 5


def test_dropout_is_off_and_nothing_is_changed():
    model, questions = tiny_roberta(dropout=0.5), random_questions(20)
    state = torch.get_rng_state()
    right = cloze_accuracy(model, build_tokenizer(), questions).right
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(right, cloze_accuracy(tiny_roberta(), build_tokenizer(), questions).right)


# Reading questions


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_a_file_and_what_is_skipped_in_it(tmp_path):
    source = write(
        tmp_path / "questions.jsonl",
        {"text": "Iron is a ____.", "answer": " metal ", "choices": ["metal", "gas"]},
        {"text": "[MASK] is a gas.", "answer": "Neon"},
        "",
        {"text": "Tin is [BLANK] too", "answer": "one", "choices": []},
        {"text": "Tin is <mask>", "answer": "one", "choices": None},
        {"text": "Tin is __", "answer": "one"},
        {"text": "___ is ___", "answer": "one"},
        {"text": "Tin is ___"},
        {"text": "Tin is ___", "answer": 3},
        {"text": "Tin is ___", "answer": "  "},
        {"text": "Tin is ___", "answer": "one", "choices": ["two", "three"]},
        {"text": "Tin is ___", "answer": "one", "choices": "one two"},
        {"text": "Tin is ___", "answer": "one", "choices": ["one", "one"]},
        {"answer": "one"},
    )
    questions = load_questions(source)
    assert questions.usable == [
        Question("Iron is a ", ".", "metal", ("metal", "gas")),
        Question("", " is a gas.", "Neon"),
        Question("Tin is ", " too", "one"),
        Question("Tin is ", "", "one"),
    ]
    assert questions.skipped == {
        "no blank": 1,
        "several blanks": 1,
        "no answer": 3,
        "answer not among the choices": 1,
        "choices that are no list of texts": 1,
        "a single choice": 1,
        "no text": 1,
    }


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "a ___", "answer": "b"}, '{"text": "a ___", "ans'], "questions.jsonl:2: broken JSON"),
        ([[1, 2]], "questions.jsonl:1: a list; write one JSON object per line"),
        ([{"text": "a", "answer": "b"}], "no question that can be asked .skipped: 1 no blank"),
        ([], "no question that can be asked$"),
    ],
)
def test_bad_files(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        load_questions(write(tmp_path / "questions.jsonl", *rows))


@pytest.mark.parametrize(
    "source, message",
    [
        ("built-in:boi", "there are no built-in questions 'boi'. Did you mean 'bio'?"),
        ("nothing.jsonl", "nothing.jsonl: cannot be read: .*No such file"),
    ],
)
def test_sources_that_are_not_there(source, message):
    with pytest.raises(UserError, match=message):
        load_questions(source)


def test_tokenizers_that_cannot_ask():
    tokenizer = build_tokenizer()
    tokenizer.mask_token = None
    for unfit, message in ((tokenizer, "no mask token"), (ByT5Tokenizer(), "no fast one")):
        with pytest.raises(UserError, match=message):
            cloze_accuracy(tiny_roberta(), unfit, random_questions(1))
