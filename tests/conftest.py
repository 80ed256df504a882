"""A tiny world: a word-level tokenizer, a RoBERTa of two layers, random blocks of token ids."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on a hub; without this, each miss is retried for long

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WORDS = [f"w{i}" for i in range(59)]
VOCABULARY = len(SPECIAL_TOKENS) + len(WORDS)
BOS, PAD, EOS, UNK, MASK = range(len(SPECIAL_TOKENS))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; `<s>` before a text and `</s>` after it, as RoBERTa."""
    ids = {word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def tiny_roberta(dropout: float = 0.0, seed: int = 0, **overrides) -> RobertaForMaskedLM:
    """Two layers of four heads, in training mode; the parameters are a function of `seed`."""
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
        "type_vocab_size": 1,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "initializer_range": 0.2,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    torch.manual_seed(seed)
    return RobertaForMaskedLM(RobertaConfig(**{**config, **overrides})).train()


def random_blocks(count: int, length: int = 12, seed: int = 0) -> Dataset:
    """Blocks as `pack` makes them: `<s>`, random words, `</s>`; all of one length."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(len(SPECIAL_TOKENS), VOCABULARY, (count, length - 2), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": [[BOS, *row, EOS] for row in words]})


def random_batch(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A masked and padded batch with rows of the given lengths, two predicted tokens or more in each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    attention_mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(len(SPECIAL_TOKENS), VOCABULARY, shape, generator=generator)
    tokens = torch.where(attention_mask == 1, tokens, PAD)
    predicted = (torch.rand(shape, generator=generator) < 0.3) & (attention_mask == 1)
    predicted[:, :2] = True
    return {
        "input_ids": torch.where(predicted, MASK, tokens),
        "attention_mask": attention_mask,
        "labels": torch.where(predicted, tokens, -100),
        "example_id": torch.arange(len(lengths)),
    }


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Sums in one order, and no fight over cores with what else runs."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("das_lm.run.processes.use_all_cores", lambda: None)  # it would hold for all that follows
        yield


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage():
    """The Trainer collects garbage at the end of every run, which takes longer than these runs where it looks through
    all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _environment_as_it_was():
    """`TrainingArguments(torch_compile=True)` asks for compilation through the environment, for all that follows."""
    before = {name for name in os.environ if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        if name not in before:
            del os.environ[name]


@pytest.fixture(scope="session", autouse=True)
def _no_report_of_every_run():
    """Drawing takes longer than these runs; `tests/end_to_end` sees the report that ends a recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("das_lm.run.walk._report", lambda output: output / "report.html")
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()
