"""Packing and windows against naive re-implementations."""

import warnings

import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from das_lm.data import packing
from das_lm.data.packing import pack, special_tokens, windows
from das_lm.errors import UserError
from tests.data.helpers import make_documents, make_tokenizer


@pytest.fixture(params=["bert", "causal"])
def tokenizer(request):
    return make_tokenizer(request.param)


def naive_pack(texts, tokenizer, max_length):
    prefix, suffix, separator = ([1], [2], 2) if tokenizer.cls_token else ([], [], 4)
    stream = []
    for i, text in enumerate(texts):
        stream += [separator] if i else []
        stream += [tokenizer.convert_tokens_to_ids(word) for word in text.split()]
    room = max_length - len(prefix) - len(suffix)
    blocks = [stream[i : i + room] for i in range(0, len(stream), room)]
    if len(blocks) > 1 and len(blocks[-1]) < 8:
        blocks.pop()
    return [prefix + block + suffix for block in blocks]


@pytest.mark.parametrize("max_length", [11, 16, 57])
def test_pack_equals_the_naive_loop_across_map_batches_and_chunks(tokenizer, max_length, monkeypatch):
    monkeypatch.setattr(packing, "BLOCKS_PER_CHUNK", 100)
    documents = make_documents(2345)  # three batches of datasets.map
    blocks = pack(documents, tokenizer, max_length)
    assert blocks.column_names == ["input_ids"]
    assert list(blocks["input_ids"]) == naive_pack(documents["text"], tokenizer, max_length)


@pytest.mark.parametrize("tokens, kept", [(7, 1), (8, 1), (20, 2), (27, 2), (28, 3)])
def test_the_last_block_needs_eight_tokens_of_text_unless_it_is_the_only_one(tokens, kept):
    tokenizer = make_tokenizer("bert")
    blocks = pack(Dataset.from_dict({"text": [" ".join(["w1"] * tokens)]}), tokenizer, 12)
    # ten tokens of text per block: 20 = two full blocks, 27 = two and seven left over, 28 = two and eight
    assert len(blocks) == kept
    assert all(len(block) <= 12 for block in blocks["input_ids"])


def test_several_processes_give_the_same_blocks(tokenizer):
    documents = make_documents(50)
    assert list(pack(documents, tokenizer, 16, num_proc=2)["input_ids"]) == list(
        pack(documents, tokenizer, 16)["input_ids"]
    )


def test_tokens_of_documents_on_disk_are_cached(tokenizer, tmp_path):
    make_documents(20).save_to_disk(tmp_path / "documents")
    for _ in range(2):
        documents = Dataset.load_from_disk(tmp_path / "documents")
        pack(documents, tokenizer, 16)
    assert len(list((tmp_path / "documents").glob("cache-*.arrow"))) == 1


def test_special_tokens(tokenizer):
    assert special_tokens(tokenizer) == (([1], [2]) if tokenizer.cls_token else ([], []))


def test_windows_cover_each_document_and_never_mix_two(tokenizer):
    documents = make_documents(1500)
    prefix, suffix = special_tokens(tokenizer)
    rows = windows(documents, tokenizer, 12)
    assert set(rows.column_names) == {"input_ids", "document", "bytes"}
    content = {}
    covered = {}
    for row in rows:
        ids = row["input_ids"]
        assert len(ids) <= 12
        assert ids[: len(prefix)] == prefix and ids[len(ids) - len(suffix) :] == suffix
        content.setdefault(row["document"], []).extend(ids[len(prefix) : len(ids) - len(suffix)])
        assert len(row["bytes"]) == len(ids) and not any(row["bytes"][: len(prefix)])
        covered[row["document"]] = covered.get(row["document"], 0) + sum(row["bytes"])
    for index, text in enumerate(documents["text"]):
        assert content[index] == [tokenizer.convert_tokens_to_ids(word) for word in text.split()]
        assert covered[index] == len(text.encode())


def test_bytes_of_a_token_are_those_of_its_text():
    tokenizer = make_tokenizer("causal")
    rows = windows(Dataset.from_dict({"text": [" é 日本 w1 w2 é "]}), tokenizer, 2)
    # characters: " é", " 日本" | " w1", " w2" | " é "; é takes 2 bytes, 日 and 本 take 3 each
    assert rows["bytes"][:] == [[3, 7], [3, 3], [4]]


def test_tokens_of_one_character_count_its_bytes_once():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rows = windows(Dataset.from_dict({"text": ["a日b"]}), PreTrainedTokenizerFast(tokenizer_object=tokenizer), 9)
    assert rows["bytes"][:] == [[1, 3, 0, 0, 1]]


def test_long_documents_raise_no_warning(tokenizer, caplog):
    documents = Dataset.from_dict({"text": ["w1 " * 100]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack(documents, tokenizer, 16)
        windows(documents, tokenizer, 16)
    assert "longer than" not in caplog.text


def make_silent_tokenizer():
    """It knows no word, and has no token for those."""
    silent = Tokenizer(models.WordPiece({"<s>": 0}, unk_token="<s>"))
    silent.normalizer = normalizers.Replace(Regex("."), "")
    return PreTrainedTokenizerFast(tokenizer_object=silent)


def test_no_token_and_no_room_are_errors(tokenizer):
    for make in (pack, windows):
        with pytest.raises(UserError, match="the text is empty"):
            make(Dataset.from_dict({"text": ["", " \n"]}), tokenizer, 16)
        with pytest.raises(UserError, match="makes no token of the text"):
            make(Dataset.from_dict({"text": ["", "x"]}), make_silent_tokenizer(), 16)
    with pytest.raises(UserError, match="max_length 2 leaves no room"):
        windows(Dataset.from_dict({"text": ["w1"]}), make_tokenizer("bert"), 2)
