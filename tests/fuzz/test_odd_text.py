"""Text as it comes: other scripts, emoji, right-to-left, combining marks, control characters, NUL, lines of 10 MB,
other line ends, byte order marks, other encodings. It arrives as it is, by every reader, or a message says where not.
"""

import codecs
import csv
import gzip
import json
import time

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from das_lm.data.blocks import TrainingBlocks
from das_lm.data.domains import Domain
from das_lm.data.masking import labeling
from das_lm.data.packing import pack, windows
from das_lm.errors import UserError
from tests.helpers import build_tokenizer

TEXTS = [
    "المعرفة السابقة تبقى كما هي بعد التعلم",
    "הידע הקודם נשאר כפי שהוא אחרי הלמידה",
    "继续预训练而不遗忘：先学生物医学，再学计算机科学。",
    "日本語のテキスト、句読点。ｶﾀｶﾅ",
    "पूर्व ज्ञान वैसा ही रहता है, सीखने के बाद भी।",
    "ความรู้เดิมยังคงอยู่หลังจากการเรียนรู้",
    "Знание остаётся таким, каким было.",
    "Ἡ γνῶσις μένει ὡς ἦν, ναί.",
    "emoji 👩‍👩‍👧‍👦 🇺🇳 👍🏽 ❤️ in a sentence",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘ combining marks",
    "right\u202eto left\u202c override, and \u2066isolates\u2069",
    "spaces\u00a0\u2003\u3000\u200b\u200d\ufeff of many kinds",
    "separators\u2028of\u2029lines\x85that\x0bare\x0cno\x1cline\x1dends",
    "controls \x01\x02\x07\x08\x1b[31mred\x1b[0m\x7f and a\ttab",
    "astral \U0001d518\U00020000\U0010ffff and no characters \uffff\ufdd0",
    'quotes "a", \'b\', commas, semicolons; back\\slash, {json}, <script>alert("x")</script>',
    "=cmd|' /C calc'!A0 and @SUM(1+1) are text, too",
    "e\u0301 and \u00e9 are two documents' letters",
    "\u00e9 and e\u0301 are two documents' letters",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, so that text can be read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def write_text(path, texts, end="\n"):
    path.write_bytes(end.join(texts).encode())


def write_json(path, texts, end="\n", ascii_only=True):
    path.write_bytes("".join(json.dumps({"text": t}, ensure_ascii=ascii_only) + end for t in texts).encode())


def write_raw_json(path, texts, end="\n"):
    write_json(path, texts, end, ascii_only=False)


def write_csv(path, texts, end="\n"):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator=end).writerows([["n", "text"], *enumerate(texts)])


def write_parquet(path, texts, end=""):
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)


KINDS = {
    "txt": (write_text, "x.txt"),
    "escaped": (write_json, "x.jsonl"),
    "jsonl": (write_raw_json, "x.json"),
    "csv": (write_csv, "x.csv"),
    "parquet": (write_parquet, "x.parquet"),
}


@pytest.mark.parametrize("how", ["plain", "crlf", "bom", "gzip"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_arrives_as_it_is(kind, how, tmp_path, tokenizer):
    write, name = KINDS[kind]
    if kind == "parquet" and how != "plain":
        return
    path = tmp_path / name
    write(path, TEXTS, end="\r\n" if how == "crlf" else "\n")
    if how == "bom":
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    if how == "gzip":
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    loaded = Domain("x", str(path), min_characters=5).load()
    assert loaded.warnings == []
    assert sorted([*loaded.train["text"], *loaded.held_out["text"]]) == sorted(TEXTS)
    if how == "plain":
        _assert_blocks_hold(list(loaded.train["text"]), loaded.train, tokenizer)
        rows = windows(loaded.held_out, tokenizer, 16)
        for number, text in enumerate(loaded.held_out["text"]):
            mine = [row for row in rows if row["document"] == number]
            assert tokenizer.decode([token for row in mine for token in row["input_ids"]]) == text
            assert sum(sum(row["bytes"]) for row in mine) == len(text.encode())


def _assert_blocks_hold(texts, documents, tokenizer):
    """All text in its order, cut into blocks; what a last block of fewer than 8 tokens drops aside."""
    packed = pack(documents, tokenizer, 32)
    blocks = TrainingBlocks({"x": packed}, labeling(tokenizer, causal=True, mlm_probability=0.15), 0)
    assert len(blocks) == len(packed)
    stream = [token for block in packed["input_ids"] for token in block]
    read = [[]]
    for token in stream:
        if token == tokenizer.eos_token_id:
            read.append([])
        else:
            read[-1].append(token)
    decoded = [tokenizer.decode(one) for one in read]
    assert decoded[:-1] == texts[: len(decoded) - 1]
    rest = texts[len(decoded) - 1 :]
    assert len(rest) == 1 and len(rest[0].encode()) - len(read[-1]) < 8
    assert rest[0].encode().startswith(bytes(tokenizer.decode(read[-1]), "utf-8").rstrip("\ufffd".encode()))


def test_escaped_nul_and_half_pairs(tmp_path, tokenizer):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines += ['{"text": "zero \\u0000 byte in a document"}', '{"text": "half of a pair \\ud83d here"}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    loaded = Domain("x", "x.jsonl").load()
    texts = [*loaded.train["text"], *loaded.held_out["text"]]
    assert "zero \0 byte in a document" in texts and "half of a pair ? here" in texts
    _assert_blocks_hold(list(loaded.train["text"]), loaded.train, tokenizer)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_a_line_of_ten_megabytes(kind, tmp_path):
    write, name = KINDS[kind]
    long = "w" * 4_000_000 + "ü" * 3_000_000
    write(tmp_path / name, [*TEXTS, long])
    started = time.process_time()
    loaded = Domain("x", name, min_characters=5).load()
    texts = [*loaded.train["text"], *loaded.held_out["text"]]
    assert len(texts) == len(TEXTS) + 1 and max(texts, key=len) == long
    assert time.process_time() - started < 20


def test_blocks_of_a_line_of_ten_megabytes(tmp_path):
    (tmp_path / "x.txt").write_text("\n".join([*TEXTS, ("w" * 99 + " ") * 100_000]), encoding="utf-8")
    blocks = pack(Domain("x", "x.txt", min_characters=5, held_out=0.01).load().train, build_tokenizer(), 1_002)
    assert len(blocks) in (100, 101) and all(len(block) == 1_002 for block in blocks[:99]["input_ids"])


BROKEN = {
    "lone byte": b"\xff",
    "continuation": b"\x80",
    "overlong": b"\xc0\xaf",
    "surrogate": b"\xed\xa0\x80",
    "too large": b"\xf5\x80\x80\x80",
    "cut off": b"\xe2\x82",
    "latin-1": "Größe".encode("latin-1"),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("before", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "x.txt.gz"])
def test_what_is_no_utf_8_is_told_by_its_byte(name, before, broken, tmp_path):
    lines = [text.encode() for text in TEXTS[:5]]
    if "jsonl" in name:
        lines = [json.dumps({"text": text}).encode() for text in TEXTS[:5]]
    if "csv" in name:
        lines[0] = b"text"
    lines[3] += BROKEN[broken] + b"."
    content = before + b"\n".join(lines)
    with pytest.raises(UnicodeDecodeError) as expected:
        content.decode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError, match=rf"{name}:4: not UTF-8 text \(byte {expected.value.start:,} is 0x"):
        Domain("x", name, min_characters=5).load()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_unicode_encodings_are_told(encoding, tmp_path):
    (tmp_path / "x.txt").write_bytes("\n".join(TEXTS).encode(encoding))
    with pytest.raises(UserError, match="x.txt.*(not UTF-8 text|a binary file)"):
        Domain("x", "x.txt").load()


def test_a_zero_byte_is_told_by_its_place(tmp_path):
    content = codecs.BOM_UTF8 + b"The first line is fine.\nThe second\0 one is not.\n"
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"x.txt: a binary file, not text \(NUL at byte {content.index(0)}\)"):
        Domain("x", "x.txt").load()
