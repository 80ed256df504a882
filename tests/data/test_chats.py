"""Documents that are conversations: made text by the tokenizer's chat template, wherever they are read."""

import json

import datasets
import pytest
from datasets import Dataset

from das_lm.data.chats import CHAT, in_words
from das_lm.data.domains import Domain
from das_lm.data.packing import ends_documents, pack, windows
from das_lm.errors import UserError
from das_lm.measure.leakage import find_leakage
from tests.helpers import EOS, build_tokenizer
from tests.methods.test_anchor import trainer_of
from tests.model.helpers import tiny_gpt2

TEMPLATE = "{% for m in messages %}w1 {{ m['role'] }} {{ m['content'] }} w2 {% endfor %}"


def chat(number: int) -> list[dict[str, str]]:
    words = " ".join(f"w{3 + (number * 7 + place) % 50}" for place in range(12))
    return [{"role": "user", "content": words}, {"role": "assistant", "content": f"w{5 + number % 40} w4"}]


CHATS = [chat(number) for number in range(40)]


@pytest.fixture
def tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def as_template(messages) -> str:
    return "".join(f"w1 {one['role']} {one['content']} w2 " for one in messages)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_messages_of_files(kind, streaming, tmp_path, tokenizer):
    rows = Dataset.from_list([{"messages": messages} for messages in CHATS])
    path = tmp_path / f"chats.{kind}"
    rows.to_json(path) if kind == "jsonl" else rows.to_parquet(path)
    domain = Domain("chats", str(path), column="messages", held_out=0.2, streaming=streaming)
    documents = domain.load()
    texts = [row["text"] for row in (*documents.train, *documents.held_out)]
    assert {text.removeprefix(CHAT) for text in texts} == {json.dumps(messages) for messages in CHATS}


def test_the_template_makes_text_of_them(tokenizer):
    texts = [CHAT + json.dumps(messages) for messages in CHATS]
    packed = pack(Dataset.from_dict({"text": texts}), tokenizer, 32)
    plain = pack(Dataset.from_dict({"text": [as_template(messages) for messages in CHATS]}), tokenizer, 32)
    assert packed["input_ids"][:] == plain["input_ids"][:]
    measured = windows(Dataset.from_dict({"text": texts}), tokenizer, 32)
    assert sum(map(sum, measured["bytes"])) == sum(len(as_template(messages).encode()) for messages in CHATS)


def test_a_tokenizer_without_a_template(tokenizer):
    rows = Dataset.from_dict({"text": [CHAT + json.dumps(CHATS[0])]})
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="the chat template of the tokenizer fails on .*roles must alternate"):
        pack(rows, tokenizer, 32)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        windows(rows, tokenizer, 32)


def test_words_of_a_chat_are_found_in_plain_text(tmp_path):
    said = "the quick brown fox jumps over the lazy dog and runs on through the wide green woods at night"
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": f"{said} {n}"}]}) + "\n" for n in range(4))
    )
    (tmp_path / "plain.txt").write_text(f"{said} 1\n\n{said} again, and once more so that it is long")
    text = {
        "chats": Domain("chats", f"{tmp_path}/chats.jsonl", column="messages").load(),
        "plain": Domain("plain", f"{tmp_path}/plain.txt").load(measure_only=True),
    }
    (found,) = [one for one in find_leakage(text).leaked if (one.trained, one.measured) == ("chats", "plain")]
    assert len(found.found) == 2
    assert in_words(CHAT + json.dumps([{"role": "user", "content": said}])) == said


@pytest.mark.parametrize("kind", ["data set", "list", "hub"])
def test_messages_from_python(kind, tmp_path, tokenizer, monkeypatch):
    data, column, chats = Dataset.from_list([{"messages": messages} for messages in CHATS]), "messages", CHATS
    if kind == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
        documents = Domain("chats", "hub:someone/chats", column="messages", held_out=0.2).load()
        assert len(documents.train) + len(documents.held_out) == len(CHATS)
        data, column = documents.train, "text"
        chats = [json.loads(text.removeprefix(CHAT)) for text in data["text"]]
    expected = pack(Dataset.from_dict({"text": [as_template(messages) for messages in chats]}), tokenizer, 16)
    given = {"train_dataset": list(data) if kind == "list" else data, "processing_class": tokenizer}
    trainer = trainer_of(tmp_path, tiny_gpt2(), "naive", max_length=16, text_column=column, **given)
    read = trainer.train_dataset.domains["bio"].with_format(None)
    assert read["input_ids"][:] == expected["input_ids"][:]


def test_a_column_of_other_lists_is_no_text(tmp_path):
    (tmp_path / "numbers.jsonl").write_text('{"text": [1, 2]}\n')
    with pytest.raises(UserError, match=r"numbers.jsonl:1: column 'text' holds .*, not text"):
        Domain("numbers", f"{tmp_path}/numbers.jsonl").load()


def test_where_a_turn_ends_a_document_may_not(tokenizer):
    assert ends_documents(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    assert not ends_documents(tokenizer) and tokenizer.sep_token_id == EOS
    tokenizer.sep_token = "<mask>"
    assert ends_documents(tokenizer)
