"""Streams: the blocks of the map-style path, shuffled by windows, resumable anywhere, in memory that does not grow."""

import gzip
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from das_lm import ContinualTrainer, DASConfig
from das_lm.cli import main
from das_lm.data import domains, streaming
from das_lm.data.blocks import TrainingBlocks
from das_lm.data.domains import Domain
from das_lm.data.masking import labeling
from das_lm.data.packing import pack
from das_lm.data.streaming import DocumentStream, TrainingStream
from das_lm.errors import UserError
from das_lm.measure.results import Results
from das_lm.randomness import permutation
from das_lm.run.recipe_file import load_recipe
from tests.data.helpers import make_documents, make_tokenizer
from tests.helpers import WORDS, build_tokenizer, tiny_roberta

TOKENIZER = build_tokenizer()
SEED = 3


@pytest.fixture(autouse=True)
def _little_at_once(monkeypatch, tmp_path):
    """Reads that end in the midst of the text, and a cache of the test's own."""
    monkeypatch.setattr(streaming, "CHARACTERS_AT_ONCE", 200)
    monkeypatch.setattr(streaming, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts_of(count, seed=0):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(5, 20))) for _ in range(count)]


def stream_of(documents, tokenizer=TOKENIZER, buffer=8, max_length=12, domain="bio"):
    if isinstance(documents, datasets.Dataset):
        documents = documents.to_iterable_dataset()
    if isinstance(documents, datasets.IterableDataset):
        documents = DocumentStream(documents)
    masking = labeling(tokenizer, tokenizer.mask_token is None, 0.15)
    return TrainingStream(documents, tokenizer, max_length, masking, SEED, domain, buffer)


def assert_same_row(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


# ---- the blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["bert", "causal"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 30, 31, 32, 33, 34, 35])  # whose last blocks differ
def test_unshuffled_they_are_those_of_pack(style, count):
    tokenizer, documents = make_tokenizer(style), make_documents(count, seed=count)
    expected = pack(documents, tokenizer, 12)["input_ids"]
    stream = stream_of(documents, tokenizer, buffer=1)
    assert stream.available(10**9) == len(expected)
    for _ in range(2):  # the second time they are read anew
        assert [stream.block(position).tolist() for position in range(len(expected))] == list(expected)


def test_order_and_masks_are_a_function_of_seed_domain_epoch_and_window():
    """Against a naive loop over windows, with the rows that the map-style blocks have in each epoch."""
    documents = make_documents(40)
    whole = pack(documents, TOKENIZER, 12)
    stream = stream_of(documents, buffer=8)
    rows = TrainingBlocks({"bio": whole}, stream.masking, SEED)
    assert len(whole) % 8
    position = 0
    for epoch in range(2):
        for window, start in enumerate(range(0, len(whole), 8)):
            for local in permutation(min(8, len(whole) - start), SEED, "bio", epoch, window):
                expected = rows.row(rows.domains["bio"], "bio", start + int(local), epoch)
                assert_same_row(stream[position], expected)
                position += 1
    other = stream.at(-1)
    assert other.available(5) == 5
    local = permutation(8, SEED, "bio", -1, 0)[0]
    assert_same_row(other[0], rows.row(rows.domains["bio"], "bio", int(local), -1))
    assert_same_row(stream[position - 1], expected)  # which `at` left where it was


def test_what_is_replayed_is_a_function_of_the_window():
    stream = stream_of(make_documents(40), buffer=8)
    plain = [stream[position]["example_id"] for position in range(60)]
    memory = [{"input_ids": stream.block(index)} for index in range(4)]
    stream.replay("a", memory, 0.25)
    rows = [stream[position] for position in range(60)]
    assert 5 <= sum(row["replayed_from"] for row in rows) <= 25
    for row, example in zip(rows, plain, strict=True):
        assert (row["example_id"] == example) != row["replayed_from"]
    again = stream_of(make_documents(40), buffer=8)
    again.replay("a", memory, 0.25)
    for position in (59, 17, 3):  # backwards, which reads again
        assert_same_row(again[position], rows[position])
    again.replay("b", memory, 0.25)
    both = [again[position]["replayed_from"] for position in range(60)]
    assert [number == 1 for number in both] == [row["replayed_from"] == 1 for row in rows]
    assert 5 <= both.count(2) <= 25
    stream.replay("a", memory, 1.0)
    drawn = [stream[position] for position in range(200)]  # over several epochs, of a handful of masks each
    assert len({row["example_id"] for row in drawn}) == 200


def test_a_document_longer_than_a_read_and_documents_without_a_token():
    documents = datasets.Dataset.from_dict({"text": [" ".join(WORDS * 20), "w1", *texts_of(30), "w2 " * 7]})
    stream = stream_of(documents, buffer=4)
    assert stream.available(10**9) == len(pack(documents, TOKENIZER, 12))
    empty = stream_of(datasets.Dataset.from_dict({"text": [" ", ""]}))
    with pytest.raises(UserError, match="the stream: the text is empty"):
        empty[0]


# ---- resuming ----------------------------------------------------------------------------------------------------


def lines(path, texts, opener=open):
    with opener(path, "wt") as file:
        file.writelines(text + "\n" for text in texts)


def source_files(directory):
    lines(directory / "a.txt", texts_of(40))
    lines(directory / "b.txt.gz", texts_of(40, seed=1), gzip.open)
    lines(directory / "c.jsonl", [json.dumps({"text": text}) for text in texts_of(20, seed=2)])
    return Domain("bio", [f"{directory}/{name}" for name in ("a.txt", "b.txt.gz", "c.jsonl")], streaming=True)


def source_limited(directory):
    domain = source_files(directory)
    return Domain("bio", domain.data, streaming=True, max_documents=70, min_characters=30)


@pytest.fixture
def parquet_on_a_hub(tmp_path, monkeypatch):
    """What the library reads of Parquet by streaming: Arrow batches, cut as they come."""
    for part in range(2):
        rows = datasets.Dataset.from_dict({"text": texts_of(50, seed=part)})
        rows.to_parquet(tmp_path / f"{part}.parquet", batch_size=7)
    load = datasets.load_dataset

    def load_dataset(name, config, *, split, revision, streaming):
        files = sorted(map(str, tmp_path.glob("*.parquet")))
        return load("parquet", data_files={split: files}, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("source", [source_files, source_limited, "hub"])
def test_resumes_at_the_same_document(source, tmp_path, parquet_on_a_hub):
    """From any position, with what JSON keeps of the state; and without the documents before its window."""
    domain = Domain("bio", "hub:some/text", streaming=True) if source == "hub" else source(tmp_path)
    documents = domain.load().train
    whole, buffer = stream_of(documents), 8
    count = whole.available(10**9)
    assert count > 70
    rows = [whole[position] for position in range(2 * count)]  # two epochs
    whole = stream_of(documents)
    for position in range(0, 2 * count, 7):
        whole[min(position + 5, 2 * count - 1)]  # a data loader is ahead of the model
        state = json.loads(json.dumps(whole.state_dict(position)))
        rest = stream_of(documents)
        rest.load_state_dict(state)
        for following in range(position, min(position + 12, 2 * count)):
            assert_same_row(rest[following], rows[following])
        place = rest._places[0]
        assert place.row <= position < place.row + buffer
        assert state["document"] == next(documents.batches(state["source"]))[1][0]["id"]
        if place.block:
            assert state["skip"] < 200 + 3 * 20 + 12  # at most one read is tokenized again


def test_resumes_without_a_place():
    """The beginning is a place before every position."""
    whole, rest = (stream_of(make_documents(40)) for _ in range(2))
    rest.load_state_dict(rest.state_dict(57))
    assert_same_row(rest[57], whole[57])


@pytest.mark.parametrize("changed", [0, 15, 58])
@pytest.mark.parametrize("position", [24, 130])  # in the first and in the second epoch
def test_other_text_is_noticed(position, changed):
    """As far as it was read: of a second epoch, all."""
    documents = make_documents(60)
    stream, other = stream_of(documents), texts_of(60)
    epoch = stream_of(documents).available(10**9)
    assert 24 < epoch < 130
    texts = list(documents["text"])
    texts[changed] = other[changed]
    stream[position]
    state = json.loads(json.dumps(stream.state_dict(position)))
    rest = stream_of(datasets.Dataset.from_dict({"text": texts}))
    assert state["seen"][0] in ((60,) if position > epoch else range(16, 58))
    if changed < state["seen"][0]:
        with pytest.raises(UserError, match="are not those that the run has read: the text or its order has"):
            rest.load_state_dict(state)
    else:
        rest.load_state_dict(state)
    stream_of(documents).load_state_dict(state)


def test_text_that_changes_while_it_is_read_is_noticed():
    """At the end of the next epoch; and of a hub data set, which is not loaded again, at the place of a checkpoint."""
    documents, stream = make_documents(60), stream_of(make_documents(60))
    epoch = stream.available(10**9)
    stream[epoch + 1]
    stream.documents.source = make_documents(60, seed=1).to_iterable_dataset()
    with pytest.raises(UserError, match="read to its end again, and differs from the first time"):
        stream[4 * epoch]
    stream = stream_of(documents)
    stream[40]
    remote = stream_of(make_documents(60, seed=1))
    remote.documents.is_remote = True
    remote.load_state_dict(stream.state_dict(40))
    with pytest.raises(UserError, match="another document stands now: the text or its order has changed"):
        remote[40]


def test_many_windows_between_two_checkpoints(monkeypatch):
    """Only the newest places are kept; from an older position on, the stream is read from its beginning."""
    monkeypatch.setattr(streaming, "PLACES", 4)
    stream = stream_of(make_documents(60), buffer=2)
    stream[70]
    assert len(stream._places) == 4
    rest = stream_of(make_documents(60), buffer=2)
    rest.load_state_dict(stream.state_dict(11))
    assert_same_row(rest[11], stream_of(make_documents(60), buffer=2)[11])


def config(output_dir, **options):
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "max_length": 12,
        "importance_samples": 20,
        "memory_size": 6,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "save_steps": 3,
    }
    return DASConfig(output_dir=str(output_dir), **{**defaults, **options})


def trainer_of(output_dir, documents, method=("das", "replay"), **options):
    trainer = ContinualTrainer(
        tiny_roberta(0.1),
        config(output_dir, **options),
        list(method),
        stream_of(documents) if isinstance(documents, DocumentStream) else documents,
        processing_class=TOKENIZER,
        domain="bio",
    )
    memory = trainer.methods[-1].memory if "replay" in method else []
    if not len(memory) and "replay" in method:
        memory.add([{"input_ids": row} for row in np.random.default_rng(0).integers(5, 60, (6, 12))])
    return trainer


@pytest.mark.parametrize("step", [3, 6])  # in the first and in the second epoch
def test_resumed_equals_uninterrupted(step, tmp_path):
    """Bit for bit: parameters, losses, importance, and the memory that is drawn from the stream."""
    (tmp_path / "text").mkdir()
    documents = source_limited(tmp_path / "text").load().train
    documents.source = documents.source.take(30)
    whole, rest = (trainer_of(tmp_path / name, documents, dataloader_num_workers=2) for name in "ab")
    epoch = stream_of(documents).available(10**9)
    assert 3 * 8 < epoch < 6 * 8
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert rest.train_dataset._places[0].row > 0  # did not read from the beginning
    for ours, theirs in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    last = [[entry["loss"] for entry in run.state.log_history if "loss" in entry][-2:] for run in (rest, whole)]
    assert last[0] == last[1]
    das, replay = (rest.methods[index].state_dict() for index in (0, 1))
    for ours, theirs in ((das, whole.methods[0].state_dict()), (replay, whole.methods[1].state_dict())):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name


def test_a_trainer_takes_an_iterable_data_set(tmp_path):
    documents = make_documents(60).to_iterable_dataset()
    run = trainer_of(tmp_path, documents, method=["naive"], max_steps=2, save_strategy="no")
    run.train()
    assert run.state.global_step == 2
    with pytest.raises(UserError, match="max_steps: how long domain 'bio' is, is not known"):
        trainer_of(tmp_path, documents, method=["naive"], max_steps=-1)


def test_importance_sees_the_rows_of_its_epoch(tmp_path):
    """As many as there are, each once, though more are asked for."""
    documents = make_documents(20)
    count = len(pack(documents, TOKENIZER, 12))
    run = trainer_of(tmp_path, documents.to_iterable_dataset(), ["naive"], importance_samples=1000)
    seen = torch.cat([batch["example_id"] for batch in run.importance_batches(-2)])
    assert len(seen) == len(seen.unique()) == count


# ---- memories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 20])  # part of an epoch, and more than one
def test_memories_are_drawn_from_what_was_trained_on(steps):
    documents = make_documents(60)
    stream = stream_of(documents)
    stream.length = steps * 8
    (rows,) = stream.domains.values()
    whole = pack(documents, TOKENIZER, 12)["input_ids"]
    trained = [stream.block(position).tolist() for position in range(min(stream.length, len(whole)))]
    assert len(rows) == len(trained)
    assert [row["input_ids"].tolist() for row in islice(rows, len(rows))] == trained
    if steps == 20:
        assert sorted(trained) == sorted(whole)


# ---- processes ---------------------------------------------------------------------------------------------------


def test_processes_take_their_rows_of_the_same_batches():
    documents = make_documents(80)

    def batches(processes, rank, rows):
        stream = stream_of(documents)
        stream.length = 96
        sampler = BatchSampler(SequentialSampler(stream), rows, drop_last=False)
        loader = DataLoader(
            stream, batch_sampler=BatchSamplerShard(sampler, processes, rank), collate_fn=lambda rows: rows
        )
        return [[row["example_id"] for row in batch] for batch in loader]

    whole, first, second = batches(1, 0, 8), batches(2, 0, 4), batches(2, 1, 4)
    assert len(whole) == len(first) == len(second) == 12
    for batch, ours, theirs in zip(whole, first, second, strict=True):
        assert ours + theirs == batch
    assert len(set(sum(whole, []))) == 96


# ---- held out ----------------------------------------------------------------------------------------------------


def test_held_out_documents_are_the_first_by_hash_and_never_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(domains, "MAX_HELD_OUT", 5)
    texts = texts_of(200)
    lines(tmp_path / "a.txt", [*texts, *texts])  # every document has a copy, far behind
    loaded = Domain("bio", str(tmp_path / "a.txt"), streaming=True, held_out=0.1).load()
    rows = [*DocumentStream(loaded.train.source, min_characters=20)]
    low = [row for row in rows[:200] if int(row["id"], 16) / 2**64 < 0.1]
    assert len(low) > 5
    assert list(loaded.held_out["id"]) == [row["id"] for row in low[:5]]
    trained = [row["id"] for row in loaded.train]
    assert trained == [row["id"] for row in rows if row["id"] not in set(loaded.held_out["id"])]
    assert len(trained) == len(rows) - 10
    measured = Domain("bio", str(tmp_path / "a.txt"), streaming=True).load(measure_only=True)
    assert list(measured.held_out["id"]) == [row["id"] for row in rows[:5]]


def test_a_short_stream_has_a_held_out_document(tmp_path):
    lines(tmp_path / "a.txt", texts_of(3))
    loaded = Domain("bio", str(tmp_path / "a.txt"), streaming=True, held_out=1e-6).load()
    assert len(loaded.held_out) == 1 and len([*loaded.train]) == 2


def test_held_out_files(tmp_path):
    texts = texts_of(20)
    lines(tmp_path / "a.txt", texts)
    lines(tmp_path / "b.txt", texts[:4])
    loaded = Domain("bio", str(tmp_path / "a.txt"), streaming=True, held_out=str(tmp_path / "b.txt")).load()
    assert [row["text"] for row in loaded.train] == texts[4:]


# ---- bad input ---------------------------------------------------------------------------------------------------


def failing(after):
    for index in range(after):
        yield {"text": f"document {index}"}
    raise ConnectionError("the server\nhung up")


def test_reading_that_breaks_off():
    source = datasets.IterableDataset.from_generator(failing, gen_kwargs={"after": 50})
    with pytest.raises(UserError, match="bio: reading broke off: the server hung up; go on with --resume"):
        list(DocumentStream(source, where="bio"))


def test_nothing_to_train_on(tmp_path):
    lines(tmp_path / "a.txt", ["short", "shorter"])
    with pytest.raises(UserError, match=r"domain 'bio': there is no document of min_characters \(20\) or more"):
        Domain("bio", str(tmp_path / "a.txt"), streaming=True).load()
    lines(tmp_path / "a.txt", ["This is the same document again."] * 3)
    with pytest.raises(UserError, match="domain 'bio': nothing is left to train on"):
        Domain("bio", str(tmp_path / "a.txt"), streaming=True).load()
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="a.txt: the file is empty"):
        Domain("bio", str(tmp_path / "a.txt"), streaming=True).load()


RECIPE = """\
model_name_or_path: {0}/model
output_dir: {0}/output
method: [naive]
domains:
  - {{name: bio, data: {0}/bio.txt, streaming: true, shuffle_buffer: 16}}
  - {{name: cs, data: {0}/cs.txt}}
training: {{max_length: 24, max_steps: 4, per_device_train_batch_size: 4, importance_samples: 8, save_steps: 2,
           disable_tqdm: true, use_cpu: true, report_to: none}}
"""


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "max_steps: 4, ",
            "",
            "r.yaml:7: training: domain 'bio' is streamed, and how long it is, is not known: write",
        ),
        ("[naive]", "[joint]", "r.yaml:3: method: 'joint' mixes all domains so far, and 'bio' is streamed"),
        ("[naive]", "[naive]\nschedule: interleaved", "r.yaml:4: schedule: 'interleaved' mixes whole domains, and"),
    ],
)
def test_recipes_that_cannot_stream(old, new, message, tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE.format(tmp_path).replace(old, new))
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path / "r.yaml")
    assert message in str(error.value)


# ---- the walk ----------------------------------------------------------------------------------------------------


def test_a_recipe_that_streams(tmp_path):
    """With a method that remembers rows of the stream; and once more with its earlier half taken away."""
    tiny_roberta(0.1).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    lines(tmp_path / "bio.txt", texts_of(60))
    lines(tmp_path / "cs.txt", texts_of(60, seed=1))
    recipe = RECIPE.format(tmp_path).replace("[naive]", "[das, replay]")
    (tmp_path / "r.yaml").write_text(recipe)
    assert main(["pretrain", "--recipe", str(tmp_path / "r.yaml")]) == 0
    results = Results.load(tmp_path / "output")
    assert [stage["name"] for stage in results.stages] == ["base", "bio", "cs"]
    assert results.run["documents"]["bio"] is None
    assert "'bio' is streamed" in results.run["warnings"]["bio"][0]
    assert "| bio | " in (tmp_path / "output" / "2-cs" / "README.md").read_text()


# ---- memory ------------------------------------------------------------------------------------------------------


def test_peak_memory_does_not_grow_with_the_text():
    """100 MB against 10 MB, trained on for three steps and read to the end. The tokens of 90 MB would take 36 MB, its
    text 90 MB; a place that is kept of every window, next to nothing."""
    script = Path(__file__).parents[2] / "scripts" / "measure_streaming.py"
    result = subprocess.run(
        [sys.executable, script, "--megabytes", "10", "100", "--shuffle_buffer", "2000"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    small, large = (line.split() for line in result.stderr.splitlines() if " MB: " in line)
    assert int(large[2]) > 8 * int(small[2])  # blocks
    assert float(large[5]) - float(small[5]) < 20
