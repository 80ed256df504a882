"""Tasks of lm-eval, with the built-in questions and a task of a user's: the whole path without a network."""

import json

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from das_lm.cli import main
from das_lm.data import built_in
from das_lm.errors import UserError
from das_lm.measure import harness as module
from das_lm.measure.cloze import cloze_accuracy, load_questions
from das_lm.measure.harness import Harness, HarnessConfig, _answers
from das_lm.measure.results import Results

pytest.importorskip("lm_eval")
LIMIT = 40


@pytest.fixture(scope="module")
def causal():
    folder = built_in.CAUSAL_MODEL
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def _evaluate(output, *options, base="built-in-causal", more=()):
    checkpoints = [text for one in (f"base={base}", *more) for text in ("--checkpoint", one)]
    return main(
        ["evaluate", *checkpoints, "--domain", "bio", "--output_dir", str(output), "--use_cpu", "true", *options]
    )


def test_the_built_in_questions_are_answered_as_our_own_measure_answers_them(causal):
    """Both choose the filling with which the text is likeliest, whole words after the same beginning."""
    harness = Harness({"facts": "das_lm_general"}, HarnessConfig(limit=LIMIT))
    found = harness.ask("facts", *causal, 16)
    questions = load_questions("built-in:general")
    own = cloze_accuracy(*causal, type(questions)(questions.usable[:LIMIT], {}))
    assert len(found.scores) == LIMIT and found.metric == "acc" and found.tasks == 1
    assert (found.scores == own.right).mean() > 0.9 and found.scores.mean() > found.chance + 0.2
    assert found.chance == pytest.approx(own.chance)


def test_matrix_intervals_report_and_cache(tmp_path, monkeypatch, causal, capsys):
    model, tokenizer = causal
    worse = AutoModelForCausalLM.from_pretrained(built_in.CAUSAL_MODEL)
    worse.get_input_embeddings().weight.data.mul_(0.3)
    worse.save_pretrained(tmp_path / "worse")
    tokenizer.save_pretrained(tmp_path / "worse")
    options = ["--lm_eval", "das_lm_general,bio.facts=das_lm_bio", "--limit", str(LIMIT), "--num_fewshot", "0"]
    more = (f"bio={tmp_path}/worse",)
    assert _evaluate(tmp_path / "out", *options, more=more) == 0
    printed = capsys.readouterr()
    assert "Lm-eval score" in printed.out and "loglikelihood" not in printed.err  # no bars where nobody looks
    results = Results.load(tmp_path / "out")
    assert results.columns("lm_eval") == {"das_lm_general": None, "bio.facts": 1}
    entry = results.stages[1]["lm_eval"]["das_lm_general"]
    assert entry["score"] < results.stages[0]["lm_eval"]["das_lm_general"]["score"] - 0.1
    assert entry["task"] == "das_lm_general" and entry["examples"] == LIMIT and len(entry["interval"]) == 2
    low, high = results.intervals["lm_eval"]["drift"]
    assert 0 < low < results.summary()["lm_eval"]["drift"] < high

    before = (tmp_path / "out" / "forgetting.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(module.Harness, "ask", lambda *_: pytest.fail("asked again"))
        assert _evaluate(tmp_path / "out", *options, more=more) == 0
        assert json.loads((tmp_path / "out" / "forgetting.json").read_text()) == json.loads(before)
        with pytest.raises(BaseException, match="asked again"):
            _evaluate(tmp_path / "out", *options[:2], "--limit", "3", more=more)

    from das_lm.report.page import write_report

    page = write_report([tmp_path / "out"]).read_text()
    assert "Tasks of lm-eval" in page and "Result matrix: lm-eval score" in page


def test_a_task_of_ones_own_and_a_group(tmp_path, causal):
    rows = [{"question": f"{number} and", "choices": ["one", "two", "three"], "gold": 0} for number in range(7)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("mine_b", "mine_a"):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
            "doc_to_target: gold\n"
        )
    (tmp_path / "mine.yaml").write_text("group: mine\ntask: [mine_a, mine_b]\n")
    harness = Harness({"all": "mine", "half": "mine_a"}, HarnessConfig(limit=4, include_path=str(tmp_path)))
    whole, half = harness.ask("all", *causal, 8), harness.ask("half", *causal, 8)
    assert whole.tasks == 2 and len(whole.scores) == 8 and whole.chance == pytest.approx(1 / 3)
    assert np.array_equal(whole.scores, np.tile(half.scores, 2))
    assert whole.metric == "acc_norm" and whole.metrics["acc_norm"] == whole.scores.mean()
    assert harness.identity("all") != harness.identity("half")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    again = Harness({"half": "mine_a"}, HarnessConfig(limit=4, include_path=str(tmp_path)))
    assert again.identity("half") != harness.identity("half")


def test_examples_stand_in_one_order_and_scores_are_bounded():
    def logged(number: int, **scores):
        one = {"doc_id": number, "filter": "none", "metrics": list(scores), "arguments": [(), ()], **scores}
        return one

    shuffled = {"b": [logged(1, acc=1.0), logged(0, acc=0.0)], "a": [logged(0, acc=1.0), logged(1, acc=1.0)]}
    found = _answers("t", shuffled)
    assert found.scores.tolist() == [1, 1, 0, 1] and found.chance == 0.5 and found.tasks == 2
    filtered = {"a": [logged(0, acc=1.0), {**logged(0, acc=0.0), "filter": "other"}]}
    assert _answers("t", filtered).scores.tolist() == [1]
    preferred = {"a": [logged(0, f1=0.5, acc=0.0, acc_norm=1.0, perplexity=(3, 4))]}
    assert _answers("t", preferred).metric == "acc_norm" and set(_answers("t", preferred).metrics) == {
        "f1",
        "acc",
        "acc_norm",
    }
    assert _answers("t", {"a": [logged(0, brier_score=0.2, f1=0.6)]}, {"brier_score"}).metric == "f1"
    with pytest.raises(UserError, match="no score from 0 to 1"):
        _answers("t", {"a": [logged(0, word_perplexity=(-3.0, 4))]})


@pytest.mark.parametrize(
    ("options", "base", "message"),
    [
        (["--lm_eval", "das_lm_boi"], "built-in-causal", "there is no task 'das_lm_boi'. Did you mean 'das_lm_bio'?"),
        (
            ["--lm_eval", "das_lm_bio", "--limit", "0"],
            "built-in-causal",
            "--limit 0: is a number of examples, 1 or more",
        ),
        (["--limit", "3"], "built-in-causal", "--limit: is of lm-eval; name its tasks with --lm_eval"),
        (["--lm_eval", "das_lm_bio", "--include_path", "nowhere"], "built-in-causal", "there is no directory nowhere"),
        (["--lm_eval", "das_lm_bio", "--apply_chat_template", "true"], "built-in-causal", "has no chat template"),
        (["--lm_eval", "hellaswag"], "built-in-causal", "lm_eval: the task 'hellaswag' cannot be loaded"),
        (["--lm_eval", "das_lm_bio"], "built-in", "lm_eval: asks causal language models"),
    ],
)
def test_bad_input(options, base, message, tmp_path, capsys):
    assert _evaluate(tmp_path / "out", *options, base=base) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'das-lm\[lm_eval\]'"):
        Harness({"bio": "das_lm_bio"}, HarnessConfig())
