"""Leakage: what it finds equals what naive loops find; nothing is found by chance; the command says it."""

import io
import json
import random

import numpy as np
import pytest
from datasets import Dataset
from rich.console import Console

from das_lm.cli import main
from das_lm.data.domains import Documents, Domain
from das_lm.measure import leakage
from das_lm.measure.leakage import _shortened, find_leakage


def documents(train: list[str] | None, held_out: list[str]) -> Documents:
    def dataset(name, texts):
        return Dataset.from_dict({"id": [f"{name}{number}" for number in range(len(texts))], "text": texts})

    return Documents(train and dataset("t", train), dataset("h", held_out), [])


def overlap(train: list[str], held_out: list[str], n: int = leakage.N) -> leakage.Overlap:
    return find_leakage({"x": documents(train, held_out)}, n).leaked[0]


def random_texts(seed: int, count: int, longest: int = 40) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices("abc", k=draw.randint(0, longest))) for _ in range(count)]


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Of a text shorter than n words all of its words; of one that is too short to judge nothing."""
    words = text.split()
    if len(words) < min(n, leakage.SHORTEST):
        return []
    n = min(n, len(words))
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def stands_in(words: tuple[str, ...], text: str) -> bool:
    return f" {' '.join(words)} " in f" {text} "


def naive_shares(texts: list[str], others: list[list[str]], n: int) -> dict[int, float]:
    """Number of a text -> share of its n-grams that stand in its others, where there are any."""
    shares = {}
    for number, text in enumerate(texts):
        grams = ngrams(text, n)
        found = [any(stands_in(gram, other) for other in others[number]) for gram in grams]
        if any(found):
            shares[number] = float(np.mean(found))
    return shares


@pytest.mark.parametrize("n", [5, 9, 13])
@pytest.mark.parametrize("chunk", [3, 1 << 22])
def test_found_documents_and_shares_are_those_of_naive_loops(monkeypatch, n, chunk):
    monkeypatch.setattr(leakage, "_CHUNK", chunk)
    train, held_out = random_texts(0, 60), random_texts(1, 40)
    held_out[3:5] = [train[7], " ".join(train[9].split()[:10])]
    train[20:22] = [train[5], f"{train[6]} {train[8]}"]
    found = find_leakage({"x": documents(train, held_out)}, n, repeated=True)
    leaked, repeated = found.leaked[0], found.repeated[0]
    expected = naive_shares(held_out, [train] * len(held_out), n)
    assert {int(one.id[1:]): one.share for one in leaked.found} == pytest.approx(expected)
    assert 3 in expected and 0 < len(expected) < len(held_out)
    expected = naive_shares(train, [train[:number] for number in range(len(train))], n)
    assert {int(one.id[1:]): one.share for one in repeated.found} == pytest.approx(expected)
    assert expected[20] == 1
    assert leaked.too_short == sum(len(text.split()) < min(n, leakage.SHORTEST) for text in held_out)


def test_a_passage_is_in_both_documents_and_as_long_as_it_says():
    train, held_out = random_texts(0, 60), random_texts(1, 40)
    held_out[3] = f"{held_out[3]} {train[7]} a"
    found = overlap(train, held_out, n=6)
    assert len(found.examples) == leakage.EXAMPLES
    assert len({one.source for one in found.examples}) == leakage.EXAMPLES
    assert found.found[0].id == "h3" and found.found[0].words >= len(train[7].split())
    assert [one.words for one in found.found] == sorted((one.words for one in found.found), reverse=True)
    for one in found.examples:
        assert len(one.passage.split()) == one.words
        assert stands_in(one.passage.split(), held_out[int(one.id[1:])])
        assert stands_in(one.passage.split(), train[int(one.source[1:])])


def test_a_hash_that_always_collides_finds_nothing_false(monkeypatch):
    monkeypatch.setattr(leakage, "_hashes", lambda codes, length: np.zeros(len(codes) - length + 1, np.uint64))
    train, held_out = random_texts(0, 30), random_texts(1, 30)
    true = naive_shares(held_out, [train] * len(held_out), 6)
    for one in overlap(train, held_out, n=6).found:
        assert one.share <= true[int(one.id[1:])]


def test_an_ngram_across_two_documents_is_none():
    first, second = "a b c d e f g", "h i j k l m n"
    assert not overlap([first, second, "x"], [f"{first} {second}"]).found
    assert overlap([f"{first} {second}", "x"], [f"{first} {second}"]).found


def test_case_punctuation_and_space_do_not_count_and_the_passage_is_as_written():
    train = "The İstanbul-based group (of 12) showed: state-of-the-art results,  at\nlast, in 2020."
    held_out = "We say: the İSTANBUL based “group” of 12 showed state of the art — results at last in 2020; and more."
    (found,) = overlap([train, "x"], [held_out]).found
    assert found.passage == "the İSTANBUL based “group” of 12 showed state of the art — results at last in 2020"
    assert found.words == 16


def test_a_short_document_is_found_whole_and_a_very_short_one_is_not_judged():
    train = ["so it is said that nine words stand here in a row for all to see", "x"]
    whole, part, tiny = (
        "nine words stand here in a row for all",
        "nine words stand here in a row for me",
        "here in a row",
    )
    found = overlap(train, [whole, part, tiny])
    assert [(one.id, one.share, one.words) for one in found.found] == [("h0", 1, 9)]
    assert found.too_short == 1


def test_half_of_a_document_is_what_warns():
    passage = " ".join(f"w{number}" for number in range(30))  # 18 n-grams
    others = [" ".join(f"{letter}{number}" for number in range(18)) for letter in "xyz"]
    text = {
        "bio": documents([passage, "other text"], ["held out text of no consequence"]),
        "cs": documents(None, [f"{passage} {others[0]}", f"{passage} {others[1]} {others[2]}"]),
    }
    found = find_leakage(text)  # 18 of 36 n-grams, and 18 of 54
    assert [one.share for one in found.leaked[1].found] == pytest.approx([1 / 2, 1 / 3])
    ((name, warning),) = found.warnings()
    assert name == "cs" and warning.startswith("'cs': 1 of 2 measured documents") and "that of 'bio'" in warning


def test_passages_and_names_are_no_markup():
    passage = "[bold]" + " ".join(f"w{number}" for number in range(14)) + " [/nonsense]"
    text = {"[red]": documents([passage, "x"], [passage + " more"])}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*find_leakage(text, repeated=True).tables())
    printed = console.export_text()
    assert "[red]" in printed and "bold]w0" in printed


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A recipe whose domain `cs` is measured on text that `bio` trains on, and an end-task that holds some of it."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(500)}" for _ in range(30)) for _ in range(60)]
    for name, part in (("bio", texts[:30]), ("cs", texts[30:55]), ("test", texts[25:35])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part))
    (tmp_path / "clean.txt").write_text("\n".join(texts[55:]))
    (tmp_path / "task").mkdir()
    rows = [{"text": text, "label": "x"} for text in (texts[0], texts[56], "w1 w2")]
    (tmp_path / "task" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("leaking", "clean"):
        held_out = {"leaking": "test.txt", "clean": "clean.txt"}[name]
        (tmp_path / f"{name}.yaml").write_text(
            "model_name_or_path: built-in\noutput_dir: out\ndomains:\n"
            "  - {name: bio, data: bio.txt, held_out: clean.txt}\n"
            f"  - {{name: cs, data: cs.txt, held_out: {held_out}}}\n"
        )
    return tmp_path


def test_the_command_reports_and_strict_refuses(world, capsys):
    assert main(["check-data", "leaking.yaml", "--output", "found.json"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: 'cs': 5 of 10 measured documents stand in training text" in out
    assert main(["check-data", "leaking.yaml", "--strict"]) == 1
    found = json.loads((world / "found.json").read_text())
    assert {(one["trained"], one["measured"]): len(one["found"]) for one in found["leaked"]} == {
        ("bio", "bio"): 0,
        ("bio", "cs"): 5,
        ("cs", "bio"): 0,
        ("cs", "cs"): 0,  # the domain's own held-out documents have been left out of its training text
    }
    assert main(["check-data", "clean.yaml", "--strict"]) == 0


def test_the_command_reads_end_tasks_and_other_domains(world, capsys):
    arguments = ["check-data", "clean.yaml", "--strict", "--output", "found.json"]
    assert main([*arguments, "--end_task", "task=task", "other=clean.txt"]) == 1
    found = json.loads((world / "found.json").read_text())["leaked"]
    task = next(one for one in found if one["measured"] == "task (end-task)")
    assert (task["trained"], task["documents"], task["too_short"]) == ("bio", 3, 1)
    assert [one["share"] for one in task["found"]] == [1]
    assert main([*arguments, "--domain", "cs", "--end_task", "task=task"]) == 0


@pytest.mark.parametrize(
    "arguments, phrase",
    [
        ([], "RECIPE"),
        (["clean.yaml", "--n", "1"], "--n 1"),
        (["clean.yaml", "--end_task", "task"], "--end_task task: write NAME=PATH"),
        (["clean.yaml", "--end_task", "task=nowhere.jsonl"], "no file matches 'nowhere.jsonl'"),
        (["nothing"], "recipe 'nothing'"),
    ],
)
def test_bad_input_is_one_message_and_status_2(world, capsys, arguments, phrase):
    assert main(["check-data", *arguments]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("das-lm")]
    assert error.startswith("das-lm: error: ") and phrase in error


def test_the_built_in_text_shares_phrases_but_was_not_trained_on():
    text = {name: Domain(name).load() for name in ("bio", "cs")} | {"general": Domain("general").load(True)}
    found = find_leakage(text)
    assert found.warnings() == []
    passages = {one.measured: one.found[0].words for one in found.leaked if one.found}
    assert passages.keys() == {"bio", "cs"} and max(passages.values()) < 20  # of 43 words on average


def test_a_passage_commands_no_terminal():
    assert _shortened("a\x1b[31mb\x07c\nd") == "a [31mb c d" and _shortened("x" * 300) == "x" * 240 + " …"
