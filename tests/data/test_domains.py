"""Domains: every source of text, the held-out split, the warnings and every bad input."""

import csv
import gzip
import json
import os
import random
import sys
import types
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from das_lm.cli import main
from das_lm.data.built_in import documents
from das_lm.data.domains import Domain
from das_lm.errors import UserError

TEXTS = [f"This is document number {i} of a small collection." for i in range(40)]


@pytest.fixture(autouse=True)
def _own_cache_and_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def write(name, data, opener=open):
    with opener(name, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())
    return name


def write_json_lines(name, texts, opener=open, column="text"):
    return write(name, "".join(json.dumps({"n": 1, column: text}) + "\n" for text in texts), opener)


def all_texts(loaded):
    return sorted([*loaded.train["text"], *loaded.held_out["text"]])


# Sources


def source_txt_lines():
    return write("a.txt", "\n" + "\n".join(TEXTS) + "\n\n")  # blank lines around the text separate nothing


def source_txt_blank_lines():
    return write("a.txt", "\n\n \n" + "\n\n".join(text.replace(" of ", " of\n") for text in TEXTS))


def source_txt_gz():
    return write("a.txt.gz", "\n".join(TEXTS), gzip.open)


def source_bom_and_crlf():
    return write("a.txt", b"\xef\xbb\xbf" + "\r\n".join(TEXTS).encode())


def source_jsonl():
    return write_json_lines("a.jsonl", TEXTS)


def source_json_gz():
    return write_json_lines("a.json.gz", TEXTS, gzip.open)


def source_glob():
    write_json_lines("a.jsonl", TEXTS[:10])
    write_json_lines("b.jsonl", TEXTS[10:])
    return "*.jsonl"


def source_list():
    return [write_json_lines("a.jsonl", TEXTS[:10]), write("b.txt", "\n".join(TEXTS[10:]))]


def source_csv():
    with open("a.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(TEXTS))
    return "a.csv"


def source_parquet():
    datasets.Dataset.from_dict({"n": list(range(40)), "text": TEXTS}).to_parquet("a.parquet")
    return "a.parquet"


SOURCES = [function for name, function in list(globals().items()) if name.startswith("source_")]


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_documents_and_the_same_split(source):
    loaded = Domain("d", source()).load()
    reference = Domain("d", write_json_lines("reference.jsonl", TEXTS)).load()
    assert loaded.train.column_names == loaded.held_out.column_names == ["id", "text"]
    assert loaded.warnings == []
    if source is source_txt_blank_lines:
        assert all_texts(loaded) == sorted(text.replace(" of ", " of\n") for text in TEXTS)
        return
    assert all_texts(loaded) == sorted(TEXTS)
    assert set(loaded.held_out["id"]) == set(reference.held_out["id"])


def test_quoted_line_breaks_in_csv():
    with open("a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        writer.writerows([[f'{text}\nsecond, "line"' + "x" * 200_000] for text in TEXTS[:2]])
    assert all_texts(Domain("d", "a.csv").load()) == [f'{text}\nsecond, "line"' + "x" * 200_000 for text in TEXTS[:2]]


def test_a_file_that_changes_is_read_again():
    Domain("d", write("a.txt", "\n".join(TEXTS))).load()
    assert all_texts(Domain("d", write("a.txt", "\n".join(TEXTS[:5]))).load()) == sorted(TEXTS[:5])


def test_files_that_only_look_alike_are_told_apart(tmp_path, monkeypatch):
    """The same relative name, size and time, in two directories."""
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path)
        Path(name).mkdir()
        monkeypatch.chdir(name)
        Path("text.txt").write_text("\n".join(f"text {index} of {name}, long enough" for index in range(4)))
        os.utime("text.txt", (10**9, 10**9))
        loaded = Domain("d", "text.txt").load()
        texts = [row["text"] for part in (loaded.train, loaded.held_out) for row in part]
        assert len(texts) == 4 and all(f"of {name}" in text for text in texts)


def test_documents_of_files_are_on_disk_so_that_their_tokens_are_cached():
    loaded = Domain("d", source_jsonl()).load()
    assert loaded.train.cache_files


def test_max_documents():
    assert all_texts(Domain("d", source_jsonl(), max_documents=7).load()) == sorted(TEXTS[:7])


def test_halves_of_surrogate_pairs_become_question_marks():
    write(
        "a.jsonl",
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + '{"text": "This is half a pair: \\ud83d"}\n',
    )
    assert "This is half a pair: ?" in all_texts(Domain("d", "a.jsonl").load())


def test_built_in():
    loaded = Domain("bio").load()
    assert list(loaded.train["text"]) == [document["text"] for document in documents("bio", "train")]
    assert list(loaded.held_out["text"]) == [document["text"] for document in documents("bio", "held_out")]
    assert not set(loaded.train["id"]) & set(loaded.held_out["id"])
    other = Domain("medicine", "built-in:bio").load(measure_only=True)
    assert other.train is None
    assert list(other.held_out["id"]) == list(loaded.held_out["id"])


# Held-out documents


def test_the_split_depends_on_the_text_alone():
    shuffled = random.Random(0).sample(TEXTS, k=40)
    first = Domain("d", write("a.txt", "\n".join(TEXTS))).load()
    second = Domain("other", write_json_lines("b.jsonl", shuffled, column="body"), column="body").load()
    assert set(first.held_out["text"]) == set(second.held_out["text"])
    assert len(first.held_out) == 4
    # the same on every machine and in every version
    assert sorted(first.held_out["id"]) == [
        "07f8668640a5ac89",
        "19a481e9db2a8fd5",
        "234b3e25e0640c0e",
        "24adf5d18163ae7f",
    ]
    assert list(second.train["text"]) == [text for text in shuffled if text not in set(second.held_out["text"])]


@pytest.mark.parametrize("count, share, expected", [(2, 0.001, 1), (10, 0.99, 9), (3, 0.5, 2), (30_000, 0.1, 1000)])
def test_number_of_documents_split_off(count, share, expected):
    write("a.txt", "\n".join(f"The number {i} is a whole number." for i in range(count)))
    loaded = Domain("d", "a.txt", held_out=share).load()
    assert len(loaded.held_out) == expected
    assert len(loaded.train) == count - expected


def test_held_out_files_are_kept_whole_and_out_of_the_training_text():
    write("train.txt", "\n".join([*TEXTS, TEXTS[0]]))
    write("held.txt", "\n".join([TEXTS[0], TEXTS[3], TEXTS[3], "A document that stands nowhere else.", "short"]))
    loaded = Domain("d", "train.txt", held_out="held.txt").load()
    assert list(loaded.held_out["text"]) == [TEXTS[0], TEXTS[3], "A document that stands nowhere else."]
    assert list(loaded.train["text"]) == TEXTS[1:3] + TEXTS[4:]
    assert loaded.warnings == [
        "domain 'd': 1 held-out document shorter than min_characters (20) left out",
        "domain 'd': 3 documents left out of the training text, being held out as well",
    ]


def test_what_is_left_out_is_counted():
    rows = [*TEXTS, TEXTS[5], TEXTS[5], "short", "  \n ", None]
    assert TEXTS[5] not in Domain("d", write("a.txt", "\n".join(TEXTS))).load().held_out["text"]
    loaded = Domain("d", write_json_lines("a.jsonl", rows)).load()
    assert loaded.warnings == [
        "domain 'd': 1 row without text left out",
        "domain 'd': 2 documents shorter than min_characters (20) left out",
        "domain 'd': 2 documents of the training text repeated word for word; kept",
    ]
    assert len(loaded.train) + len(loaded.held_out) == 42


def test_copies_of_a_document_never_stand_on_both_sides():
    loaded = Domain("d", write("a.txt", "\n".join(TEXTS * 3)), held_out=0.5).load()
    assert len(loaded.held_out) == len(set(loaded.held_out["text"])) == 20
    assert not set(loaded.held_out["text"]) & set(loaded.train["text"])
    assert "40 documents left out of the training text" in loaded.warnings[0]


def test_measure_only():
    write("all.txt", "\n".join([*TEXTS, TEXTS[0]]))
    write("held.txt", "\n".join(TEXTS[:3]))
    everything = Domain("d", "all.txt").load(measure_only=True)
    assert everything.train is None
    assert list(everything.held_out["text"]) == TEXTS
    assert len(Domain("d", "all.txt", held_out="held.txt").load(measure_only=True).held_out) == 3
    # the training text of a domain that is not trained on need not be there
    assert len(Domain("d", "missing.txt", held_out="held.txt").load(measure_only=True).held_out) == 3


# The hub


class Hub:
    """Stands in for `datasets.load_dataset`."""

    def __init__(self, monkeypatch, rows):
        self.rows, self.calls, self.read = rows, [], 0
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def load(self, path, name=None, *, split, revision, streaming):
        self.calls.append((path, name, split, revision, streaming))
        rows = [{"n": i, **row} for i, row in enumerate(self.rows[split])]
        if not streaming:
            return datasets.Dataset.from_list(rows)
        return datasets.IterableDataset.from_generator(self.count, gen_kwargs={"rows": rows})

    def __deepcopy__(self, memo):  # a stream is copied to be read
        return self

    def count(self, rows):
        for row in rows:
            self.read += 1
            yield row


@pytest.mark.parametrize("streaming", [False, True])
def test_hub(monkeypatch, streaming):
    held = [f"A held-out document with the number {i}." for i in range(1100)]
    hub = Hub(
        monkeypatch,
        {
            "part": [{"body": text} for text in [*TEXTS[:9], None, *TEXTS[10:]]],
            "test": [{"body": text} for text in held],
        },
    )
    domain = Domain(
        "d",
        "hub:org/name",
        config="en",
        split="part",
        revision="abc",
        column="body",
        held_out="split:test",
        streaming=streaming,
        max_documents=20,
    )
    loaded = domain.load()
    assert [row["text"] for row in loaded.train] == TEXTS[:9] + TEXTS[10:20]
    assert list(loaded.held_out["text"]) == held[:1000]
    if streaming:
        assert "domain 'd' is streamed" in loaded.warnings[0]
    else:
        assert loaded.warnings == ["domain 'd': 1 row without text left out"]
    assert set(hub.calls) == {("org/name", "en", split, "abc", streaming) for split in ("part", "test")}
    assert hub.read <= 1000 + 4 * 20  # does not run on after what is asked for


def test_hub_split_off(monkeypatch):
    Hub(monkeypatch, {"train": [{"text": text} for text in TEXTS]})
    loaded = Domain("d", "hub:org/name").load()
    assert all_texts(loaded) == sorted(TEXTS)
    assert set(loaded.held_out["text"]) == set(Domain("d", write("a.txt", "\n".join(TEXTS))).load().held_out["text"])


def test_hub_data_set_that_cannot_be_loaded(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported,\n but found name.py")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as error:
        Domain("d", "hub:org/name").load()
    assert "hub data set 'org/name', split 'train', could not be loaded: Dataset scripts are no longer" in str(
        error.value
    )
    assert "supported, but found name.py. Check its name, config, split and revision" in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"body": "x"}], "no column 'text'; there is n, body"),
        ([{"text": 3}], "column 'text' holds (3|int64), not text"),
        ([], "(split 'train', is empty|there is no document)"),
    ],
)
def test_hub_bad_columns(monkeypatch, streaming, rows, message):
    Hub(monkeypatch, {"train": rows})
    with pytest.raises(UserError, match=f"domain 'd': hub data set 'org/name'.*{message}"):
        Domain("d", "hub:org/name", streaming=streaming, max_documents=5).load()


# Bad input


BAD_FILES = {
    "no such file": ("a.txt", None, {}, "no file matches 'a.txt'"),
    "near miss": ("a.jsonl", '{"text": "x"}', {"data": "b.jsonl"}, "Did you mean 'a.jsonl'?"),
    "no match": ("a.txt", "x", {"data": "*.jsonl"}, "no file matches '*.jsonl'"),
    "binary": ("a.txt", b"some text\nmore\0text", {}, "a.txt: a binary file, not text (NUL at byte 14)"),
    "latin-1": ("a.txt", b"line one\ncaf\xe9 au lait", {}, "a.txt:2: not UTF-8 text (byte 12 is 0xe9); convert"),
    "latin-1 after a byte order mark": (
        "a.txt",
        b"\xef\xbb\xbfcaf\xe9 au lait",
        {},
        "a.txt:1: not UTF-8 text (byte 6",
    ),
    "utf-16": ("a.jsonl", '{"text": "x"}'.encode("utf-16"), {}, "a.jsonl: a binary file"),
    "not gzip": ("a.txt.gz", "plain text", {}, "a.txt.gz: cannot be read: Not a gzipped file"),
    "cut gzip": (
        "a.txt.gz",
        gzip.compress(b"text " * 1000, mtime=0)[:-9],
        {},
        "a.txt.gz: cannot be read: Compressed file ended",
    ),
    "empty": ("a.txt", "", {}, "a.txt: the file is empty"),
    "blank": ("a.jsonl", "\n  \n", {}, "a.jsonl: the file is empty"),
    "header only": ("a.csv", "text\n", {}, "a.csv: the file is empty"),
    "broken JSON": (
        "a.jsonl",
        '{"text": "x"}\n\n{"text": "y"\n',
        {},
        "a.jsonl:3: broken JSON (Expecting ',' delimiter",
    ),
    "JSON array": ("a.json", '["x"]', {}, "a.json:1: a list; write one JSON object per line"),
    "missing key": (
        "a.jsonl",
        '{"txt": "x", "n": 1}',
        {},
        "a.jsonl:1: no column 'text'; there is txt, n. Did you mean 'txt'?",
    ),
    "missing csv column": ("a.csv", "id,body\n1,x\n", {}, "a.csv:1: no column 'text'; there is id, body."),
    "not text": ("a.jsonl", '{"text": "x"}\n{"text": [1]}', {}, "a.jsonl:2: column 'text' holds a list, not text"),
    "numbers": ("a.jsonl", '{"text": 12}', {}, "a.jsonl:1: column 'text' holds 12, not text"),
    "broken CSV": ("a.csv", 'text\n"open\n', {}, "broken CSV (unexpected end of data)"),
    "not Parquet": ("a.parquet", "text", {}, "a.parquet: not a readable Parquet file"),
    "suffix": ("a.pdf", "text", {}, "'a.pdf': unsupported kind of file '.pdf'; write .txt, .jsonl"),
    "parquet.gz": ("a.parquet.gz", "text", {}, "unsupported kind of file '.parquet.gz'"),
    "all too short": (
        "a.txt",
        "one\ntwo\n",
        {},
        "no text is left: 0 rows without text, 2 documents shorter than min_ch",
    ),
    "one document": ("a.txt", TEXTS[0], {}, "there is a single document"),
    "held out = trained on": ("a.txt", "\n".join(TEXTS), {"held_out": "a.txt"}, "nothing is left to train on"),
    "held-out file missing": ("a.txt", "\n".join(TEXTS), {"held_out": "h.txt"}, "no file matches 'h.txt'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, capsys, monkeypatch):
    name, content, arguments, message = BAD_FILES[case]
    if content is not None:
        write(name, content)
    arguments = {"name": "d", "data": name, **arguments}
    with pytest.raises(UserError) as error:
        Domain(**arguments).load()
    assert message in str(error.value)

    # the same from the command line: one message, status 2
    walk = types.ModuleType("das_lm.run.walk")
    walk.continual_pretrain = lambda recipe, **kwargs: recipe.domains[0].load()
    monkeypatch.setitem(sys.modules, "das_lm.run.walk", walk)
    recipe = {"model_name_or_path": "built-in", "output_dir": "out", "domains": [arguments]}
    assert main(["pretrain", "--recipe", write("recipe.yaml", json.dumps(recipe))]) == 2
    assert f"das-lm: error: {error.value}\n" in capsys.readouterr().err


def test_bad_parquet_columns(tmp_path):
    datasets.Dataset.from_dict({"n": [1, 2]}).to_parquet("a.parquet")
    with pytest.raises(UserError, match="a.parquet: no column 'text'; there is n. Set `column`"):
        Domain("d", "a.parquet").load()
    with pytest.raises(UserError, match="a.parquet: column 'n' holds int64, not text"):
        Domain("d", "a.parquet", column="n").load()


def parquet_of(texts):
    pq.write_table(pa.table({"text": texts}), "a.parquet")


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_way_in_which_parquet_holds_text(kind):
    texts = [f"The document with the number {number}." for number in range(6)]
    parquet_of(pa.array(texts).dictionary_encode() if kind == "dictionary" else pa.array(texts, getattr(pa, kind)()))
    loaded = Domain("d", "a.parquet").load()
    assert sorted([*loaded.train["text"], *loaded.held_out["text"]]) == texts


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_with_a_dot_is_no_structure(streaming):
    texts = [f"The document with the number {number}." for number in range(6)]
    others = pa.array([{"b": "This is the text of a structure."}] * 6)
    pq.write_table(pa.table({"a": others, "a.b": texts}), "a.parquet")
    loaded = Domain("d", "a.parquet", column="a.b", held_out=0.5, streaming=streaming).load()
    train = [row["text"] for row in loaded.train]
    assert sorted([*train, *loaded.held_out["text"]]) == texts and train


def test_text_that_is_not_utf_8_and_columns_of_one_name_are_told():
    cells = pa.array([b"\xff is no text"] * 4)
    parquet_of(pa.Array.from_buffers(pa.string(), 4, cells.buffers()))
    with pytest.raises(UserError, match="a.parquet: column 'text' is not UTF-8 text"):
        Domain("d", "a.parquet").load()
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), "b.parquet")
    with pytest.raises(UserError, match="b.parquet: 2 columns are called 'text'"):
        Domain("d", "b.parquet").load()
    Path("b.csv").write_text("text,text\nx,y\n")
    with pytest.raises(UserError, match="b.csv:1: 2 columns are called 'text'"):
        Domain("d", "b.csv").load()
    parquet_of(pa.array([1, 2]).dictionary_encode())
    with pytest.raises(UserError, match="a.parquet: column 'text' holds int64, not text"):
        Domain("d", "a.parquet").load()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["b.txt", "b.parquet", "b.csv.gz"])
def test_what_is_no_file_is_told_and_not_waited_for(tmp_path, name, streaming):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("The first document of several.\nThe second document of several.\n")
    path = folder / name
    for make, what in (
        (lambda: path.symlink_to("nowhere"), "a link that leads to no file"),
        (lambda: path.symlink_to(name), "a link that leads to no file"),
        (lambda: os.mkfifo(path), "a pipe or a device"),
    ):
        make()
        for pattern in (f"{folder}/*", str(path)):
            with pytest.raises(UserError, match=f"{name}' is {what}"):
                Domain("d", pattern, streaming=streaming).load()
        path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a pipe or a device"):
        Domain("d", str(folder / "a.txt"), held_out=str(path)).load()


def test_links_that_lead_round_in_a_circle_read_no_file_twice(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("The first document of several.\nThe second document of several.\n")
    (tmp_path / "folder" / "self").symlink_to(".")
    loaded = Domain("d", f"{tmp_path}/folder/**/*.txt").load()
    assert len(loaded.train) == len(loaded.held_out) == 1 and loaded.warnings == []


def test_directory(tmp_path):
    (tmp_path / "here" / "papers").mkdir()
    with pytest.raises(UserError, match=r"'papers' is a directory; name its files, for example 'papers/\*\.txt'"):
        Domain("d", "papers").load()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "../up"}, "Domain: name: '../up' names a folder"),
        ({"name": "a" * 65}, "up to 64 letters"),
        ({"name": ".hidden"}, "the first a letter or digit"),
        ({"name": "boi", "data": "built-in"}, "no built-in text named 'boi'. Did you mean 'bio'?"),
        ({"data": "built-in:bi"}, "no built-in text named 'bi'"),
        ({"data": ""}, "Domain: data: is empty"),
        ({"data": []}, "Domain: data: is empty"),
        ({"data": ["a.txt", "hub:a/b"]}, "'hub:a/b' cannot stand in a list"),
        ({"data": "hub:"}, "names no data set"),
        (
            {"data": 3},
            "Domain: data: expected text or a list, each entry text or a list, each entry a mapping of keys to "
            "values, not 3",
        ),
        ({"data": "built-in:bio", "streaming": True}, "streaming: is for files and hub data sets"),
        ({"streaming": True, "add_tokens": 5}, "add_tokens: takes words of the whole text"),
        ({"shuffle_buffer": 0}, "shuffle_buffer: "),
        ({"config": "en"}, "config: is for hub data sets only"),
        ({"split": "test"}, "split: is for hub data sets only"),
        ({"max_documents": 0}, "max_documents: 0 must be at least 1"),
        ({"max_documents": 10**25}, "max_documents: 1e+25 is more than can be counted"),
        ({"shuffle_buffer": 10**25}, "shuffle_buffer: 1e+25 is more than can be counted"),
        ({"min_characters": 0}, "min_characters: 0 must be at least 1"),
        (
            {"held_out": 0},
            "held_out: 0 must lie between 0 and 1: a domain is measured on text that it was not trained",
        ),
        ({"held_out": 1.5}, "held_out: 1.5 must lie between 0 and 1"),
        ({"held_out": ""}, "held_out: is empty"),
        ({"held_out": "built-in"}, "held_out: holds more than paths"),
        ({"held_out": ["a.txt", "hub:a/b"]}, "held_out: holds more than paths"),
        ({"held_out": "split:test"}, "held_out: 'split:test' is for hub data sets only"),
        ({"held_out": {}}, "held_out: expected a number or text or a list, each entry text, not a mapping"),
        ({"colum": "x"}, "colum: unknown key. Did you mean 'column'?"),
        ({"training": [1]}, "training: expected a mapping of keys to values, not a list"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError) as error:
        Domain(**{"name": "d", "data": "a.txt", **arguments})
    assert message in str(error.value)
    assert "pydantic" not in str(error.value)
