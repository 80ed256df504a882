"""Builds the tiny language models that ship with the package, from the built-in corpora alone.

    python scripts/build_base_model.py                                                   # the masked one (RoBERTa)
    python scripts/build_base_model.py --kind causal --steps 4000 --document_steps 1000  # the causal one (GPT-2)
    python scripts/build_base_model.py --start_from MODEL                                # the second phase alone
    python scripts/build_base_model.py --start_from MODEL --document_steps 0             # measure alone

The byte-level BPE tokenizer is trained on all three domains, the model on `general` only: it knows the facts of that
domain and not those of the others, which is where continual pre-training begins. The first phase teaches the facts,
mostly by single sentences; the second, half of it documents, how documents read.
"""

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from das_lm.data.blocks import HeldOutWindows
from das_lm.data.built_in import BASE_MODEL, CAUSAL_MODEL, DOMAINS, cloze, documents
from das_lm.data.built_in.generator import compose
from das_lm.data.collating import PaddingCollator
from das_lm.data.masking import IGNORED, labeling
from das_lm.data.packing import special_tokens, windows
from das_lm.measure.cloze import cloze_accuracy, load_questions

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
MAX_LENGTH = 256
DROPOUT = {
    "masked": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "causal": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
}
WINDOW, UNIFORM_RATE, SEED = 128, 0.15, 42  # how `bio_then_cs` masks and measures
BLOCK_TOKENS = 16  # a batch of blocks holds this many tokens for each sentence of a batch of sentences
COMMON = 400  # a token seen more often than this in the training text is masked less


@dataclass
class BuildArguments:
    """What can be changed about the build; the defaults made the model in the package."""

    kind: Literal["masked", "causal"] = field(default="masked", metadata={"help": "What the model predicts."})
    output: Path | None = field(default=None, metadata={"help": "Folder of the result; in the package by default."})
    start_from: Path | None = field(default=None, metadata={"help": "Leave out the first phase: a model it made."})
    steps: int = field(default=9000, metadata={"help": "Optimizer steps of the first phase."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Its peak; 5 % warm-up, flat, down from half-way."})
    document_steps: int = field(default=3000, metadata={"help": "Optimizer steps of the second phase."})
    document_learning_rate: float = field(default=1e-3, metadata={"help": "Its peak."})
    batch_size: int = field(default=64, metadata={"help": "Sentences per step."})
    rare_rate: float = field(default=0.4, metadata={"help": "Share of the rare words that are masked in sentences."})
    common_rate: float = field(default=0.1, metadata={"help": "Share of the common words that are masked there."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout in pre-training; RoBERTa's config says 0.1."})
    vocab_size: int = field(default=5000, metadata={"help": "Tokens, the special ones included."})
    subwords: int = field(default=1200, metadata={"help": "How many of the tokens come from BPE merges."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order of documents and masks."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})


def train_tokenizer(vocab_size: int, subwords: int, causal: bool) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer in the manner of RoBERTa, filled up with whole words.

    BPE builds a long name by way of many pieces that are of no other use. Here it makes the subwords only; the words
    of the cloze choices and then the most frequent words of the text get a token each (`ignore_merges`). A word at the
    start of a text is tokenized as within it, and what follows a <mask> without a space stays without one. For a
    masked model a text stands between <s> and </s>, as RoBERTa has it; for a causal one after <s>, as Llama has it.
    """
    text = [d["text"] for domain in DOMAINS for d in documents(domain, "train")]
    first_space = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False)
    splitter = pre_tokenizers.Sequence([first_space, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=subwords,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    draft.train_from_iterator(text, trainer)
    learned = json.loads(draft.to_str())["model"]

    answers = sorted({choice for domain in DOMAINS for q in cloze(domain) for choice in q["choices"]})
    wanted = [word for answer in answers for word, _ in splitter.pre_tokenize_str(answer)]
    counts = Counter(word for line in text for word, _ in splitter.pre_tokenize_str(line))
    vocab = learned["vocab"]
    for word in [*wanted, *sorted(counts, key=lambda word: (-counts[word], word))]:
        if len(vocab) < vocab_size:
            vocab.setdefault(word, len(vocab))

    merges = [tuple(merge) for merge in learned["merges"]]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=SPECIAL["unk_token"], ignore_merges=True))
    core.pre_tokenizer = splitter
    core.decoder = decoders.ByteLevel()
    start, end = SPECIAL["bos_token"], SPECIAL["eos_token"]
    if causal:
        core.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, vocab[start])]
        )
    else:
        core.post_processor = processors.RobertaProcessing(
            (end, vocab[end]), (start, vocab[start]), add_prefix_space=True
        )
    special = {**SPECIAL, "mask_token": AddedToken(SPECIAL["mask_token"], lstrip=True, special=True)}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=MAX_LENGTH, **special)


def new_model(tokenizer: PreTrainedTokenizerFast, causal: bool, dropout: float) -> PreTrainedModel:
    """
    Four layers, hidden size 128, tied embeddings.

    The weights start larger than usual (0.02 suits a hidden size of 768) and the positions as sine waves; without this
    the loss stays for thousands of steps where word frequencies alone would put it.
    """
    common = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.08,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if causal:
        sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": MAX_LENGTH}
        config = GPT2Config(**common, **sizes, **dict.fromkeys(DROPOUT["causal"], dropout))
        model = GPT2LMHeadModel(config)
        positions = model.transformer.wpe.weight.data  # [positions, hidden]
    else:
        config = RobertaConfig(
            **common,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=MAX_LENGTH + 2,  # RoBERTa counts positions from padding_idx + 1
            type_vocab_size=1,
            **dict.fromkeys(DROPOUT["masked"], dropout),
        )
        model = RobertaForMaskedLM(config)
        positions = model.roberta.embeddings.position_embeddings.weight.data
    angle = torch.arange(len(positions))[:, None] * 1000 ** -torch.linspace(0, 1, config.hidden_size // 2)
    positions.copy_(0.12 * torch.cat([angle.sin(), angle.cos()], dim=1))
    return model


class Masker:
    """Of the chosen words or tokens 80 % become <mask>, 10 % random tokens, 10 % stay. `rates`: [vocab]."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rates: torch.Tensor, whole_words: bool):
        self.rates, self.mask_id, self.size = rates, tokenizer.mask_token_id, len(tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(range(self.size))
        special = set(tokenizer.all_special_ids)
        self.special = torch.tensor([i in special for i in range(self.size)])
        starts = (not whole_words or i in special or token.startswith("Ġ") for i, token in enumerate(tokens))
        self.starts = torch.tensor(list(starts))

    def __call__(self, ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Masked ids and their labels, both [batch, length]."""
        word = self.starts[ids].long().cumsum(dim=1)  # [batch, length]
        chosen = torch.rand(ids.shape[0], ids.shape[1] + 1, generator=generator).gather(1, word) < self.rates[ids]
        chosen &= ~self.special[ids]
        fate = torch.rand(ids.shape, generator=generator)
        noise = torch.randint(self.size, ids.shape, generator=generator)
        masked = torch.where(chosen & (fate < 0.8), self.mask_id, ids)
        return torch.where(chosen & (fate >= 0.9), noise, masked), torch.where(chosen, ids, IGNORED)


class NextTokens:
    """The label of a token is the one that follows."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.padding = tokenizer.pad_token_id

    def __call__(self, ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and their labels, both [batch, length]."""
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
        return ids, labels.masked_fill(labels == self.padding, IGNORED)


@dataclass
class Phase:
    """A stretch of pre-training: single sentences, every `block_every`-th step packed documents instead."""

    steps: int
    learning_rate: float
    seed: int
    block_every: int
    block_length: int
    of_sentences: Masker | NextTokens
    of_blocks: Masker | NextTokens


def phases(tokenizer: PreTrainedTokenizerFast, args: BuildArguments) -> list[Phase]:
    """Facts, then documents. Of sentences, the rare words, which carry the facts, are masked more often."""
    if args.kind == "causal":
        words = tokens = NextTokens(tokenizer)
    else:
        ids = [i for ids in tokenizer([d["text"] for d in documents("general", "train")])["input_ids"] for i in ids]
        counts = torch.bincount(torch.tensor(ids), minlength=len(tokenizer))
        words = Masker(tokenizer, torch.where(counts > COMMON, args.common_rate, args.rare_rate), whole_words=True)
        tokens = Masker(tokenizer, torch.full((len(tokenizer),), UNIFORM_RATE), whole_words=False)
    both = [
        Phase(0 if args.start_from else args.steps, args.learning_rate, args.seed, 6, MAX_LENGTH, words, words),
        Phase(args.document_steps, args.document_learning_rate, args.seed + 1, 2, WINDOW, words, tokens),
    ]
    return [phase for phase in both if phase.steps]


def batches(tokenizer: PreTrainedTokenizerFast, phase: Phase, size: int, generator: torch.Generator) -> Iterator:
    """
    For each step shuffled token ids, [batch, length], and what makes inputs and labels of them.

    Documents say many facts twice, so that a model can copy; what a sentence alone says must be known.
    """
    composed = compose("general", "train")
    end = [] if special_tokens(tokenizer)[1] else [tokenizer.eos_token_id]

    def encoded(texts: list[str]) -> list[list[int]]:
        return [ids + end for ids in tokenizer(texts)["input_ids"]]

    sentences = encoded([sentence for document in composed for sentence in document.sentences])
    whole = encoded([document.text for document in composed])

    def shuffled(source: list[list[int]]) -> list[torch.Tensor]:
        return [torch.tensor(source[i]) for i in torch.randperm(len(source), generator=generator)]

    groups, blocks = [], []
    for step in range(phase.steps):
        if step % phase.block_every == phase.block_every - 1:
            if not blocks:
                full = torch.cat(shuffled(whole)).split(phase.block_length)[:-1]
                blocks = list(torch.stack(full).split(size * BLOCK_TOKENS // phase.block_length))
            yield blocks.pop(), phase.of_blocks
        else:
            if not groups:
                order = shuffled(sentences)
                groups = [order[i : i + size] for i in range(0, len(order), size)]
            yield pad_sequence(groups.pop(), True, tokenizer.pad_token_id), phase.of_sentences


def pretrain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, phase: Phase, size: int) -> None:
    """AdamW; the learning rate rises over 5 % of the steps, stays, and falls to zero over the second half."""
    generator = torch.Generator().manual_seed(phase.seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=phase.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.05 * phase.steps), 2 * (1 - step / phase.steps))
    )
    model.train()
    progress = tqdm(batches(tokenizer, phase, size, generator), "pre-training", phase.steps, mininterval=5)
    for step, (targets, task) in enumerate(progress):
        ids, labels = task(targets, generator)
        attended = (targets != tokenizer.pad_token_id).long()
        hidden = model.base_model(input_ids=ids, attention_mask=attended).last_hidden_state
        where = labels != IGNORED  # no other position reaches the head
        loss = cross_entropy(model.lm_head(hidden[where]), labels[where])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, domain: str) -> float:
    """Nats per predicted token of the held-out documents, each on its own, as the recipes measure them."""
    text = windows(Dataset.from_list(documents(domain, "held_out")), tokenizer, WINDOW)
    rows = HeldOutWindows(text, labeling(tokenizer, model.can_generate(), UNIFORM_RATE), SEED)
    total, count = 0.0, 0
    for batch in DataLoader(rows, batch_size=16, collate_fn=PaddingCollator(tokenizer)):
        where = batch["labels"] != IGNORED
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total += cross_entropy(logits[where], batch["labels"][where], reduction="sum").item()
        count += int(where.sum())
    return total / count


def describe(phase: Phase, args: BuildArguments, minutes: float) -> str:
    """What a phase did, as a line of the README; `--start_from` takes over the lines of the model it is given."""
    words = blocks = ""
    if args.kind == "masked":
        words = f" ({args.common_rate:.0%} of the common and {args.rare_rate:.0%} of the rare words masked)"
        alike = phase.of_blocks is phase.of_sentences
        blocks = f" (masked {'alike' if alike else f'at {UNIFORM_RATE:.0%} of all tokens'})"
    return (
        f"- {phase.steps:,} steps of {args.batch_size} sentences{words} or, one step in {phase.block_every}, of "
        f"{args.batch_size * BLOCK_TOKENS // phase.block_length} packed blocks of {phase.block_length} tokens"
        f"{blocks}; peak learning rate {phase.learning_rate:g}, dropout {args.dropout:g}, seed {phase.seed}; "
        f"{minutes:.0f} CPU minutes, {args.threads} thread(s)."
    )


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, built: list[str]) -> str:
    """The README of the model, with what was measured."""
    config, causal = model.config, model.can_generate()
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        f"# Tiny {'causal' if causal else 'base'} model",
        "",
        f"A {'GPT-2 causal' if causal else 'RoBERTa masked'} language model of {parameters:,} parameters "
        f"({config.num_hidden_layers} layers, hidden size {config.hidden_size}, {len(tokenizer):,} tokens, sequences "
        f"up to {MAX_LENGTH} tokens), stored in half precision. It was pre-trained on the training text of the "
        "built-in domain `general` only; its tokenizer has seen all three domains. It is made for examples and tests "
        "of continual pre-training.",
        "",
        "Built by `scripts/build_base_model.py`, in this order, rounded to half precision after each phase:",
        "",
        *built,
        "",
        "| domain | cloze | chance | held-out loss |",
        "|---|---|---|---|",
    ]
    for domain in tqdm(DOMAINS, desc="measuring"):
        loss = held_out_loss(model, tokenizer, domain)
        answers = cloze_accuracy(model, tokenizer, load_questions(f"built-in:{domain}"))
        lines.append(f"| {domain} | {answers.accuracy:.1%} | {answers.chance:.1%} | {loss:.3f} |")
    predicted = "token" if causal else f"masked token ({UNIFORM_RATE:.0%} of them)"
    lines += [
        "",
        "*Cloze*: the questions about the domain, asked and scored as `das-lm evaluate --cloze` does, with sentences "
        f"that training never showed. *Held-out loss*: nats per {predicted} of the held-out documents, each on its "
        f"own in windows of {WINDOW} tokens, as the recipes measure it; guessing evenly would give "
        f"{math.log(len(tokenizer)):.2f}.",
        "",
    ]
    return "\n".join(lines)


def main(args: BuildArguments) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    causal = args.kind == "causal"
    output = args.output or (CAUSAL_MODEL if causal else BASE_MODEL)
    tokenizer = train_tokenizer(args.vocab_size, args.subwords, causal)
    if args.start_from:
        dropout = dict.fromkeys(DROPOUT[args.kind], args.dropout)
        architecture = GPT2LMHeadModel if causal else RobertaForMaskedLM
        model = architecture.from_pretrained(args.start_from, dtype=torch.float32, **dropout)
        built = [line for line in (args.start_from / "README.md").read_text().splitlines() if line.startswith("- ")]
    else:
        model, built = new_model(tokenizer, causal, args.dropout), []
    for phase in phases(tokenizer, args):
        start = time.process_time()
        pretrain(model, tokenizer, phase, args.batch_size)
        model = model.half().float()  # go on with, and measure, what is stored
        built.append(describe(phase, args, minutes=(time.process_time() - start) / 60))
    if not causal:
        model.config.update(dict.fromkeys(DROPOUT["masked"], 0.1))
    text = report(model.eval(), tokenizer, built)

    unfinished = output.with_name(output.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.half().save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "README.md").write_text(text, encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    unfinished.rename(output)
    print(text)
    print(f"{output}: {sum(f.stat().st_size for f in output.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main(HfArgumentParser(BuildArguments).parse_args_into_dataclasses()[0])
