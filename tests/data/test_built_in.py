"""The built-in corpora: sizes, determinism, and a held-out text that asks for knowledge and not for memory."""

import hashlib
import re
import time

import pytest

from das_lm.data.built_in import DOMAINS, SPLITS, cloze, documents
from das_lm.data.built_in.generator import clause, compose, facts, questions, tables

SENTENCE_END = re.compile(r"[.!?](?= |$)")
DIGESTS = {
    "general": "b0ff81fb4c8e0f5ad6c12bf289f81843947062e325f64977b2257d0e538be165",
    "bio": "3ef7abeef9660fadc84e47dc13b5852260c3e3524a8ae8e0ddead91e5ec9bbfb",
    "cs": "54e36c254626e3233d19373491599647136fa95a212ef11a06a9b5accf20bca2",
}


@pytest.mark.parametrize("domain", DOMAINS)
def test_sizes_and_variety(domain):
    assert len(documents(domain, "train")) >= 4000
    assert len(documents(domain, "held_out")) >= 400
    assert len(cloze(domain)) >= 200
    known = facts(domain)
    assert len(known) >= 700
    assert len({(fact.table, fact.entity) for fact in known}) >= 300
    relations = [entry for table in tables(domain).values() for entry in table["relations"].values()]
    assert len(relations) >= 15
    assert all(len(entry["patterns"].splitlines()) >= 6 for entry in relations)


@pytest.mark.parametrize("domain", DOMAINS)
def test_tables_are_well_formed(domain):
    """One right answer per question needs every (relation, entity) once; patterns must name entity and value once."""
    known = facts(domain)
    assert len({fact.key for fact in known}) == len(known)
    names = [relation for table in tables(domain).values() for relation in table["relations"]]
    assert len(set(names)) == len(names)
    for fact in known:
        for pattern in fact.patterns["train"] + fact.patterns["held_out"]:
            assert pattern.count("{e}") == pattern.count("{v}") == 1
            assert not re.search(r"[{}]|a\(n\)", clause(pattern, fact.entity, fact.value))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_documents_have_three_to_eight_sentences(domain, split):
    for composed, document in zip(compose(domain, split), documents(domain, split), strict=True):
        assert 3 <= len(composed.sentences) <= 8
        assert len(SENTENCE_END.findall(document["text"])) == len(composed.sentences), document["text"]


def test_identifiers_count_from_one():
    first, *_, last = documents("bio", "train")
    assert first["id"] == "bio-train-000001"
    assert last["id"] == f"bio-train-{len(documents('bio', 'train')):06d}"


@pytest.mark.parametrize("domain", DOMAINS)
def test_text_is_the_same_on_every_machine(domain):
    parts = [document["text"] for split in SPLITS for document in documents(domain, split)[-20:]]
    parts += [f"{question['text']} {question['answer']} {question['choices']}" for question in cloze(domain)[-20:]]
    assert hashlib.sha256("\n".join(parts).encode()).hexdigest() == DIGESTS[domain]


@pytest.mark.parametrize("domain", DOMAINS)
def test_generation_is_fast(domain):
    compose.cache_clear()
    start = time.process_time()
    documents(domain, "train")
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_document_twice(domain):
    texts = [document["text"] for split in SPLITS for document in documents(domain, split)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_states_trained_facts_with_new_sentences(domain):
    train = {pair for document in compose(domain, "train") for pair in document.pairs}
    held_out = {pair for document in compose(domain, "held_out") for pair in document.pairs}
    assert not train & held_out
    assert len(held_out) > 1000
    for fact in facts(domain):
        for pattern in fact.patterns["train"]:
            assert (*fact.key, pattern) in train
        assert len(fact.patterns["train"]) >= 4
        assert len(fact.patterns["held_out"]) >= 2


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_sentences_are_not_in_the_training_text(domain):
    """Also not within a longer sentence, in any case of letters."""
    text = "\n".join(document["text"] for document in documents(domain, "train")).lower()
    for fact in facts(domain):
        for pattern in fact.patterns["held_out"]:
            assert clause(pattern, fact.entity, fact.value).lower() + "." not in text


@pytest.mark.parametrize("domain", DOMAINS)
def test_cloze_questions_are_valid(domain):
    text = "\n".join(document["text"] for document in documents(domain, "train")).lower()
    seen = {pair for document in compose(domain, "train") for pair in document.pairs}
    seen_facts = {(relation, entity) for relation, entity, _ in seen}
    values = {(fact.relation, fact.value) for fact in facts(domain)}
    for question, public in zip(questions(domain), cloze(domain), strict=True):
        assert public["text"].count("____") == 1
        assert public["answer"] in public["choices"]
        assert 4 <= len(public["choices"]) == len(set(public["choices"]))
        assert all((question.fact.relation, choice) in values for choice in public["choices"])
        assert question.fact.key in seen_facts
        assert (*question.fact.key, question.pattern) not in seen
        rendered = public["text"].replace("____", public["answer"])
        assert rendered.lower() not in text
        assert rendered[1:] == clause(question.pattern, question.fact.entity, question.fact.value)[1:] + "."


@pytest.mark.parametrize("domain", DOMAINS)
def test_cloze_answers_are_diverse(domain):
    answers = [question["answer"] for question in cloze(domain)]
    assert len(set(answers)) > 150
    assert max(answers.count(answer) for answer in set(answers)) <= 8
    assert len({question.fact.relation for question in questions(domain)}) >= 15


def test_domains_share_words_but_not_facts():
    words = [set(re.findall(r"\w+", " ".join(d["text"] for d in documents(domain, "train")))) for domain in DOMAINS]
    stated = [{(fact.entity, fact.value) for fact in facts(domain)} for domain in DOMAINS]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert len(words[one] & words[other]) > 200
        assert not stated[one] & stated[other]


def test_unknown_names_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="'law'.*general, bio, cs"):
        documents("law", "train")
    with pytest.raises(ValueError, match="'test'.*train, held_out"):
        documents("bio", "test")
    with pytest.raises(ValueError, match="'law'.*general, bio, cs"):
        cloze("law")
