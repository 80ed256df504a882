"""Mixtures: documents of several sources within one domain, by weight."""

from collections import Counter

import pytest
from datasets import IterableDataset
from transformers import AutoTokenizer

from das_lm.data.built_in import MODELS
from das_lm.data.domains import Domain
from das_lm.data.mixtures import Part
from das_lm.data.packing import pack
from das_lm.data.streaming import DocumentStream
from das_lm.errors import UserError
from das_lm.measure.results import Results
from das_lm.report.page import write_report
from das_lm.run.recipe_file import load_recipe
from tests.helpers import run_recipe


@pytest.fixture
def files(tmp_path):
    for name, count in (("a", 2000), ("b", 2000), ("c", 30)):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} document number {n} of many" for n in range(count)))
    (tmp_path / "d.jsonl").write_text("".join(f'{{"body": "d document number {n} of all"}}\n' for n in range(2000)))
    return tmp_path


def mixture(files, *parts, **options) -> Domain:
    data = [{"path": f"{files}/{name}", "weight": weight, **more} for name, weight, more in parts]
    return Domain("mixed", data, **options)


def kinds(texts) -> Counter:
    return Counter(text[0] for text in texts)


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_come_by_weight(files, streaming):
    domain = mixture(files, ("a.txt", 0.7, {}), ("d.jsonl", 0.3, {"column": "body"}), streaming=streaming)
    train = domain.load().train
    texts = [row["text"] for row in train]
    count = kinds(texts)
    total = sum(count.values())
    assert abs(count["a"] - 0.7 * total) < 4 * (total * 0.21) ** 0.5 and count["a"] > 1700
    assert texts == [row["text"] for row in domain.load().train]  # every time in one order
    assert len({text[0] for text in texts[:20]}) == 2  # mixed, not one after the other


def test_it_ends_with_the_first_part_or_with_all(files):
    parts = ("a.txt", 1.0, {}), ("c.txt", 1.0, {})
    first, last = (
        mixture(files, *parts, stopping_strategy=how).load() for how in ("first_exhausted", "all_exhausted")
    )
    assert kinds(row["text"] for row in first.train)["a"] < 100
    repeated = kinds(row["text"] for row in last.train)
    assert repeated["c"] > 1500 and 1500 < repeated["a"] <= 2000
    assert not {row["text"] for row in last.train} & {row["text"] for row in last.held_out}  # however often it comes
    assert any("repeated" in warning for warning in last.warnings)


def test_a_stream_goes_on_where_it_stopped(files):
    domain = mixture(files, ("a.txt", 0.7, {}), ("b.txt", 0.3, {}), streaming=True)
    stream = domain.load().train
    assert isinstance(stream, DocumentStream) and isinstance(stream.source, IterableDataset)
    whole = [row["text"] for _, rows in stream.batches() for row in rows]
    batches = stream.batches()
    state, rows = next(batches)
    seen = [row["text"] for row in rows]
    rest = [row["text"] for _, rows in stream.batches(state) for row in rows]
    assert seen + rest == whole or seen[: len(whole) - len(rest)] + rest == whole


def test_in_a_recipe(files, world, tmp_path):
    path = tmp_path / "recipe.yaml"
    entry = f"[{{path: {world}/bio.txt, weight: 0.7}}, {{path: {world}/cs.txt, weight: 0.3}}]"
    path.write_text((world / "recipe.yaml").read_text().replace(f"data: {world}/bio.txt", f"data: {entry}"))
    recipe = load_recipe(path)
    assert recipe.domains[0].data == [Part(f"{world}/bio.txt", 0.7), Part(f"{world}/cs.txt", 0.3)]
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    assert run_recipe(tmp_path, tmp_path / "run", "--method", "naive") == 0


@pytest.mark.parametrize(
    ("data", "phrase"),
    [
        ([{"path": "a.txt"}, "b.txt"], "data: [1]: 'b.txt' stands among parts with a weight"),
        ([{"path": "a.txt", "weight": 0}], "data: [0]: weight"),
        ([{"path": "a.txt", "wieght": 1}], "unknown key 'wieght'"),
        ([{"weight": 1}], "[0]: no path"),
        ([{"path": ""}], "[0]: names no data"),
        ([{"path": "built-in:nothing"}], "no built-in text named 'nothing'"),
    ],
)
def test_bad_parts(data, phrase):
    with pytest.raises(UserError) as raised:
        Domain("mixed", data)
    assert phrase in str(raised.value)


def test_a_part_that_is_not_there(files):
    with pytest.raises(UserError, match=r"no file matches .*nothing\.txt"):
        mixture(files, ("a.txt", 1.0, {}), ("nothing.txt", 1.0, {})).load()


def test_a_run_says_how_many_tokens_of_each_part_it_saw(files, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"""
model_name_or_path: built-in-causal
output_dir: unused
method: [anchor, replay]
remember: [{{name: general, data: built-in, max_documents: 20}}]
domains:
  - name: mixed
    data: [{{path: {files}/a.txt, weight: 0.7}}, {{path: {files}/b.txt, weight: 0.3}}]
training: {{max_steps: 6, per_device_train_batch_size: 4, max_length: 32, anchor_share: 1.0, replay_ratio: 0.25,
           report_to: none, use_cpu: true}}
""")
    assert run_recipe(tmp_path, tmp_path / "out") == 0
    results = Results.load(tmp_path / "out")
    seen = results.stages[-1]["tokens_seen"]
    assert seen["general, remembered"] == 6 * 4 * 32
    assert seen["mixed"] + seen["general, replayed"] == 6 * 4 * 32 and seen["general, replayed"] % 32 == 0
    words = [row for row in results.tokens_seen() if row[1].startswith("mixed")]
    counts = [int(row[2].removeprefix("about ").replace(",", "")) for row in words]
    assert [row[1] for row in words] == ["mixed: 1. a.txt", "mixed: 2. b.txt"]
    assert abs(sum(counts) - seen["mixed"]) <= 1 and 0.6 < counts[0] / sum(counts) < 0.8
    card = (tmp_path / "out" / "1-mixed" / "README.md").read_text()
    assert "| mixed | general, remembered | 768 |" in card
    assert "Tokens that were trained on" in write_report([tmp_path / "out"]).read_text()


@pytest.mark.parametrize("schedule", ["alternating", "interleaved"])
def test_domains_that_are_learned_together_are_counted_apart(files, tmp_path, schedule):
    (tmp_path / "recipe.yaml").write_text(f"""
model_name_or_path: built-in-causal
output_dir: unused
method: anchor
schedule: {schedule}
remember: [{{name: general, data: built-in, max_documents: 20}}]
domains:
  - {{name: a, data: {files}/a.txt, max_documents: 60}}
  - {{name: b, data: {files}/b.txt, max_documents: 180}}
training: {{num_train_epochs: 1, per_device_train_batch_size: 1, max_length: 32, anchor_share: 1.0, report_to: none,
           use_cpu: true}}
""")
    assert run_recipe(tmp_path, tmp_path / "out") == 0
    seen = Results.load(tmp_path / "out").stages[-1]["tokens_seen"]
    tokenizer = AutoTokenizer.from_pretrained(MODELS["built-in-causal"])
    for domain in load_recipe(tmp_path / "recipe.yaml").domains:
        blocks = pack(domain.load().train, tokenizer, 32)
        assert seen[domain.name] == sum(len(row["input_ids"]) for row in blocks) > 300
    assert set(seen) == {"a", "b", "general, remembered"}


def test_replayed_rows_are_no_domains_rows_where_all_are_learned_together(files, tmp_path):
    """`joint` learns both domains in the second stage, and `replay` puts rows in the place of theirs."""
    (tmp_path / "recipe.yaml").write_text(f"""
model_name_or_path: built-in-causal
output_dir: unused
method: [joint, replay]
remember: [{{name: general, data: built-in, max_documents: 20}}]
domains:
  - {{name: a, data: {files}/a.txt, max_documents: 200}}
  - {{name: b, data: {files}/b.txt, max_documents: 200}}
training: {{max_steps: 20, per_device_train_batch_size: 4, max_length: 32, replay_ratio: 0.5, report_to: none,
           use_cpu: true}}
""")
    assert run_recipe(tmp_path, tmp_path / "out") == 0
    seen = Results.load(tmp_path / "out").stages[-1]["tokens_seen"]
    replayed = sum(count for name, count in seen.items() if name.endswith(", replayed"))
    assert set(seen) >= {"a", "b", "general, replayed"}
    assert 0.3 < replayed / sum(seen.values()) < 0.7 and 0.25 < seen["a"] / (seen["a"] + seen["b"]) < 0.75
