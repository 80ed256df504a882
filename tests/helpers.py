"""A tiny world that tests of several rooms share: a tokenizer of words, a RoBERTa of two layers, random blocks."""

import importlib.util
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from das_lm.cli import main
from das_lm.training.trainer import ContinualTrainer


def rewrite_importance(path: Path, target: Path, **changes: str | None) -> None:
    """Write an importance file with other metadata; without a key where the value is `None`."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, target, {key: value for key, value in {**metadata, **changes}.items() if value is not None})


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


def save_model(model, directory: Path) -> Path:
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def write_texts(
    root: Path, words: Mapping[str, Sequence[str]] | None = None, lengths: tuple[int, int] = (8, 20)
) -> None:
    """`NAME.txt` with up to 60 lines for each domain, of its own words: by default `old`, `bio` and `cs`."""
    words = words or {name: WORDS[20 * number : 20 * number + 19] for number, name in enumerate(("old", "bio", "cs"))}
    for number, (name, own) in enumerate(words.items()):
        draw = random.Random(number)
        lines = {" ".join(draw.choices(own, k=draw.randint(*lengths))) for _ in range(60)}
        (root / f"{name}.txt").write_text("\n".join(sorted(lines)))


def run_recipe(world: Path, output: Path, *options: str) -> int:
    return main(["pretrain", "--recipe", str(world / "recipe.yaml"), "--output_dir", str(output), *options])


def refused(world: Path, output: Path, capsys, *options: str) -> str:
    """What a recipe that is refused says."""
    capsys.readouterr()
    assert run_recipe(world, output, *options) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and not output.exists()
    return error


ROOT = Path(__file__).parents[1]


def step_losses(output: Path) -> list[float]:
    """The training losses of both domains, step by step."""
    history = [
        entry
        for stage in ("1-bio", "2-cs")
        for entry in json.loads((output / stage / "trainer_state.json").read_text())["log_history"]
    ]
    return [entry["loss"] for entry in history if "loss" in entry]


def load_script(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def signal_at_step(monkeypatch: Any, number: int, step: int, times: int = 1) -> None:
    original = ContinualTrainer.training_step

    def training_step(self, *arguments):
        if self.state.global_step + 1 == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(ContinualTrainer, "training_step", training_step)


class Interrupted(Exception):
    """What a test ends a run with."""
