"""New words: which are found, and that a tokenizer with them differs from the old one in nothing else."""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    GemmaTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
)

from das_lm.data.added_tokens import add_words, find_new_words
from das_lm.data.built_in import documents
from das_lm.data.packing import windows
from das_lm.errors import UserError

TEXT = [document["text"] for document in documents("general", "train")[:300]]
DOMAIN = Dataset.from_list(documents("bio", "train")[:200])
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
KINDS = ["gpt2", "roberta", "llama3", "llama", "llama with a normalizer", "metaspace", "gemma", "bert"]


def learned_bpe(pre_tokenizer, special):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "Byte" in repr(pre_tokenizer) else []
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXT, trainer)
    merges = [tuple(merge) for merge in json.loads(core.to_str())["model"]["merges"]]
    return core.get_vocab(), merges


def build(kind):
    """A tokenizer as the models of this name have it, trained on a little text."""
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    if kind == "bert":
        core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        core.train_from_iterator(
            TEXT, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
        )
        return BertTokenizer(core.get_vocab())
    if kind in ("gpt2", "roberta"):
        vocab, merges = learned_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), SPECIAL)
        return (GPT2Tokenizer if kind == "gpt2" else RobertaTokenizer)(vocab, merges, **names)
    if kind == "llama3":
        splits = [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        core = Tokenizer(models.BPE(*learned_bpe(pre_tokenizers.Sequence(splits), []), ignore_merges=True))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(splits), decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=core, **names)  # special tokens after the vocabulary
    apart = [] if kind == "metaspace" else [pre_tokenizers.Punctuation(), pre_tokenizers.Digits()]  # as SentencePiece
    vocab, merges = learned_bpe(pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), *apart]), SPECIAL + BYTES)
    vocab, merges = {**vocab, "▁▁": len(vocab)}, [("▁", "▁"), *merges]  # as Llama's, for several spaces
    if kind == "llama":
        return LlamaTokenizer(vocab, merges, **names)
    if kind == "gemma":
        return GemmaTokenizer(vocab, merges, **names)
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = LLAMA_DECODER
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def small(tokenizer):
    """A model for the tokenizer."""
    sizes = {"vocab_size": len(tokenizer), "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


@dataclass
class Case:
    kind: str
    old: PreTrainedTokenizerFast
    words: list[str]
    new: PreTrainedTokenizerFast
    pieces: dict[int, list[int]]  # of every new token, by the old tokenizer


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    old = build(request.param)
    words = find_new_words(DOMAIN, old, 40)
    new = add_words(small(old), old, words)
    pieces = {}
    for number, word in enumerate(words, max(old.get_vocab().values()) + 1):
        pieces[number] = old(f". {word}", add_special_tokens=False)["input_ids"][len(encode(old, ".")) :]
    return Case(request.param, old, words, new, pieces)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def sentences(words, count, seed=0):
    """Texts with words as such and within others, capitalized, beside punctuation, digits, odd spaces and letters."""
    draw = random.Random(seed)
    forms = [
        "{}",
        "{}",
        "{},",
        "({})",
        "{}'s",
        "{}-like",
        "{}s",
        "anti{}",
        "{}{}",
        "{}7",
        "{}_x",
        "{}é",
        "ab {} {}",
        " {}",
        ". {}",
    ]
    odd = ["the", "naïve", "日本語", "光 合", "12", "x_y", "  two", "\n", "\t", "…", "<0x0A>", "don't", "🧬", "of"]
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 12)):
            word = draw.choice(words)
            form = draw.choice(forms).replace("{}", draw.choice([word, word, word.capitalize(), word.upper()]))
            parts.append(draw.choice([form, form, draw.choice(odd)]))
        yield " ".join(parts).lstrip(" ")  # Llama drops the first space


def test_texts_are_cut_as_before_but_for_the_new_words_and_decode_as_before(case):
    used = Counter()
    for text in sentences(case.words, 2000):
        before, after = encode(case.old, text), encode(case.new, text)
        assert [piece for token in after for piece in case.pieces.get(token, [token])] == before, text
        assert decode(case.new, after) == decode(case.old, before), text
        assert case.kind == "bert" or decode(case.new, after) == text
        used.update(token for token in after if token in case.pieces)
    assert used.keys() == case.pieces.keys()


@pytest.mark.parametrize(
    "form, times", [("a {}", 1), ("a {} b", 1), ("a {}, b {}.", 2), ("a {}s", 0), ("a anti{} b", 0), ("a {}{}", 0)]
)
def test_a_new_word_is_one_token_after_a_space_and_never_within_a_word(case, form, times):
    if case.kind == "metaspace" and "," in form:
        pytest.skip("its tokens join letters and punctuation: a word before such is left to them")
    for number, word in zip(case.pieces, case.words, strict=True):
        assert encode(case.new, form.format(*[word] * form.count("{}"))).count(number) == times


def test_a_tokenizer_with_new_words_is_loaded_by_transformers_as_any_other(case, tmp_path):
    small(case.new).save_pretrained(tmp_path)
    case.new.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(case.new) == len(case.old) + len(case.words)
    assert loaded.all_special_tokens == case.old.all_special_tokens
    for text in sentences(case.words, 100, seed=1):
        assert loaded(text)["input_ids"] == case.new(text)["input_ids"]
    assert loaded("a b")["input_ids"] == case.old("a b")["input_ids"]  # special tokens included


def test_a_second_domain_adds_its_own(case):
    others = find_new_words(Dataset.from_list(documents("cs", "train")[:200]), case.new, 20)
    assert others and not set(others) & set(case.words)
    both = add_words(small(case.new), case.new, [*case.words[:3], *others])  # the first three are there
    assert len(both) == len(case.new) + len(others)
    for word in [*case.words, *others]:
        assert len(encode(both, f"a {word}")) == len(encode(both, "a")) + 1


def test_held_out_bytes_are_the_same(case):
    held_out = Dataset.from_list([*documents("bio", "held_out")[:30], {"id": "é", "text": "Ein é, \n 日本 word."}])

    def sizes(tokenizer):
        rows = windows(held_out, tokenizer, 40)
        total = Counter()
        for document, of_tokens in zip(rows["document"], rows["bytes"], strict=True):
            total[document] += sum(of_tokens)
        return total, sum(map(len, rows["input_ids"]))

    (before, tokens_before), (after, tokens_after) = sizes(case.old), sizes(case.new)
    assert after == before == Counter({i: len(text.encode()) for i, text in enumerate(held_out["text"])})
    assert tokens_after < tokens_before


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_what_is_found_saves_most(kind):
    tokenizer = build(kind)
    texts = [re.sub(r"[^\w ]", " , ", text) for text in DOMAIN["text"]]
    if kind == "bert":
        texts = [text.lower() for text in texts]
    seen, spread = Counter(), Counter()
    for text in texts:
        words = [word for word in f"{'' if kind == 'gpt2' else ' '}{text}".split(" ")[1:] if len(word) >= 4]
        seen.update(word for word in words if word.isalpha())
        spread.update(set(words))
    start = len(encode(tokenizer, "."))
    saved = {w: seen[w] * (len(encode(tokenizer, f". {w}")) - start - 1) for w in seen if spread[w] >= 7}
    expected = sorted((word for word in saved if saved[word]), key=lambda word: (-saved[word], word))
    dataset = Dataset.from_dict({"text": texts})
    assert find_new_words(dataset, tokenizer, 10**6, min_documents=7) == expected
    assert find_new_words(dataset, tokenizer, 5, min_documents=7) == expected[:5]
    assert len({saved[word] for word in expected}) < len(expected)  # some save the same: the text decides


def weights_of(model):
    head = model.get_output_embeddings()
    found = {"input": model.get_input_embeddings().weight, "output": head.weight, "bias": head.bias}
    return {name: weight.detach().clone() for name, weight in found.items() if weight is not None}


def models_of(size):
    sizes = {"vocab_size": size, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32}
    return [
        RobertaForMaskedLM(RobertaConfig(**sizes, max_position_embeddings=40)),
        BertForMaskedLM(BertConfig(**sizes)),
        LlamaForCausalLM(LlamaConfig(**sizes)),
        LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)),
    ]


@pytest.mark.parametrize("spare", [0, 3, 100])
def test_new_rows_are_the_means_of_their_pieces_and_old_rows_are_as_they_were(spare):
    tokenizer = build("roberta")
    size, words = len(tokenizer), find_new_words(DOMAIN, tokenizer, 10)
    for model in models_of(size + spare):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        before, count = weights_of(model), len(list(model.parameters()))
        larger = add_words(model, tokenizer, words)
        after = weights_of(model)
        rows = size + max(spare, 10)
        assert model.config.vocab_size == rows and model.get_input_embeddings().num_embeddings == rows
        assert before.keys() == after.keys() and len(list(model.parameters())) == count
        for name, weight in after.items():
            assert len(weight) == rows
            assert torch.equal(weight[:size], before[name][:size])
            assert torch.equal(weight[size + 10 :], before[name][size + 10 :])
            for number, word in enumerate(words, size):
                mean = before[name][encode(tokenizer, f" {word}")].mean(dim=0)
                torch.testing.assert_close(weight[number], mean)
        inputs = larger(f"The {words[0]} is", return_tensors="pt")
        assert size in inputs["input_ids"]
        assert model(**inputs).logits.shape[-1] == rows
        if model.config.tie_word_embeddings:
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_old_tokenizer_is_left_alone():
    tokenizer = build("bert")
    add_words(small(tokenizer), tokenizer, ["mitochondrion"])
    assert len(tokenizer) == 500 and "mitochondrion" not in tokenizer.get_vocab()


def test_case_follows_the_normalizer():
    uncased, cased = build("bert"), build("gpt2")
    assert "Cardiomyocyte".lower() in add_words(small(uncased), uncased, ["Cardiomyocyte"]).get_vocab()
    one = add_words(small(cased), cased, ["Cardiomyocyte"])
    assert one.tokenize("a Cardiomyocyte")[-1] == "ĠCardiomyocyte"
    assert len(one.tokenize("a cardiomyocyte")) > 2


def test_words_that_are_there_are_passed_over():
    tokenizer = build("gpt2")
    assert "Ġthe" in tokenizer.get_vocab()
    assert add_words(small(tokenizer), tokenizer, ["the"]) is tokenizer
    assert len(add_words(small(tokenizer), tokenizer, ["the", "genome", "genome"])) == len(tokenizer) + 1


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("word", ["two words", "well-known", "word2", "", "end.", " "])
def test_what_is_no_word_is_refused(kind, word):
    tokenizer = build(kind)
    model = small(tokenizer)
    with pytest.raises(UserError, match=f"'{word}' is not one word"):
        add_words(model, tokenizer, ["genome", word])
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("count", [0, -3])
def test_too_few_words_are_refused(count):
    with pytest.raises(UserError, match=f"add_tokens: {count} is too few"):
        find_new_words(DOMAIN, build("gpt2"), count)


def test_a_unigram_tokenizer_is_refused():
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    for call in (lambda: find_new_words(DOMAIN, tokenizer, 5), lambda: add_words(small(tokenizer), tokenizer, ["a"])):
        with pytest.raises(UserError, match="kind Unigram cannot be given words"):
            call()


def test_a_model_whose_tokenizer_transformers_builds_anew_is_refused():
    tokenizer = build("gpt2")
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 2
    with pytest.raises(UserError, match="builds the tokenizer of a qwen2 model anew"):
        add_words(Qwen2ForCausalLM(config), tokenizer, ["genome"])


@pytest.mark.parametrize("entry, refused", [("Ġzzz", True), ("madeupword0000", False)])
def test_an_entry_without_merges_is_refused_where_a_text_can_consist_of_it(entry, refused):
    """roberta-base has entries of the second sort."""
    core = build("gpt2").backend_tokenizer
    content = json.loads(core.to_str())
    content["model"]["vocab"][entry] = core.get_vocab_size()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    if refused:
        with pytest.raises(UserError, match=f"do not lead to its token '{entry}'"):
            add_words(small(tokenizer), tokenizer, ["genome"])
    else:
        add_words(small(tokenizer), tokenizer, ["genome"])
