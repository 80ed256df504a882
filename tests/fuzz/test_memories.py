"""Memories of training text beside a base model: what is no memory, or not one for this model, is one message."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from das_lm.errors import UserError
from das_lm.training.config import DASConfig
from das_lm.training.trainer import ContinualTrainer
from tests.fuzz.mutations import bad_bytes, bad_tensors
from tests.helpers import VOCABULARY, build_tokenizer, random_blocks, tiny_roberta

METHODS = {"replay": "", "agem": "", "gem": "0."}  # and what stands before the names in its file


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Learn one step of a domain with a method, beside the model in a directory; the trainer."""

    def train(method, directory=None):
        args = DASConfig(str(tmp_path_factory.mktemp("out")), max_steps=1, per_device_train_batch_size=2,
                         max_length=12, memory_size=4, replay_ratio=1.0, save_strategy="no", report_to="none",
                         use_cpu=True, disable_tqdm=True)  # fmt: skip
        model = tiny_roberta()
        model.name_or_path = str(directory or "")
        trainer = ContinualTrainer(
            model, args, method, train_dataset=random_blocks(8), processing_class=build_tokenizer()
        )
        trainer.train()
        return trainer

    return train


@pytest.fixture(scope="module", params=METHODS)
def memory(request, trained, tmp_path_factory):
    """A method, and the file of its memory."""
    directory = tmp_path_factory.mktemp(request.param)
    trained(request.param).methods[0].save(directory)
    return request.param, directory / f"{request.param}.safetensors"


def _ids(change):
    return lambda state: {**state, "memory.values.input_ids": change(state["memory.values.input_ids"])}


def _set(**tensors):
    return lambda state: {**state, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


def _without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


SHAPES, IDS = "memory.shapes.input_ids", "memory.values.input_ids"
MISTAKES = {
    "ids beyond the model": (_ids(lambda ids: ids + VOCABULARY), "tokens with ids up to"),
    "one id beyond": (_ids(lambda ids: ids.clone().index_fill_(0, torch.tensor([7]), VOCABULARY)), "ids up to 64"),
    "negative ids": (_ids(lambda ids: -ids - 1), "tokens with ids up to"),
    "numbers that are no ids": (_ids(lambda ids: ids.float()), "no blocks of token ids"),
    "truth values": (_ids(lambda ids: ids > 5), "no blocks of token ids"),
    "too few ids": (_ids(lambda ids: ids[:-5]), "split"),
    "no shapes": (_without(SHAPES), SHAPES),
    "no ids": (_without(IDS), "a memory of 0 rows"),
    "no count": (_without("memory.seen"), "memory.seen"),
    "fewer seen than kept": (_set(memory__seen=torch.tensor(1)), "rows of 1"),
    "many counts": (_set(memory__seen=torch.tensor([4, 4])), "is not as das-lm writes it"),
    "negative lengths": (lambda state: {**state, SHAPES: -state[SHAPES]}, "is not as das-lm writes it"),
    "rows of two axes": (lambda state: {**state, SHAPES: torch.tensor([[3, 4]] * 4)}, "no blocks of token ids"),
    "empty rows": (lambda state: {**state, SHAPES: 0 * state[SHAPES], IDS: state[IDS][:0]}, "a block of 0 tokens"),
    "longer than the model reads": (
        lambda state: {**state, SHAPES: torch.tensor([[48]]), IDS: state[IDS][:48]}, "a block of 48 tokens"),
    "rows of images": (
        lambda state: {"memory.seen": torch.tensor(4), "memory.values.inputs": torch.zeros(16),
                       "memory.shapes.inputs": torch.tensor([[4]] * 4)}, "no blocks of token ids"),
    "a further column": (
        _set(memory__values__label=torch.zeros(4), memory__shapes__label=torch.zeros(4, 0)), "no blocks of token ids"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_memory_that_the_model_cannot_read_is_told(memory, trained, case, tmp_path):
    (method, path), (change, message) = memory, MISTAKES[case]
    prefix = METHODS[method]
    state = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    bad = {f"{prefix}{name}": tensor.contiguous() for name, tensor in change(state).items()}
    save_file(bad, tmp_path / path.name)
    with pytest.raises(UserError) as error:
        trained(method, tmp_path)
    assert str(tmp_path / path.name) in str(error.value) and message in str(error.value)


def test_random_mistakes(memory, trained, tmp_path):
    method, path = memory
    for seed in range(12):
        draw = random.Random(seed)
        (tmp_path / path.name).write_bytes((bad_bytes if seed % 3 == 0 else bad_tensors)(draw, path.read_bytes()))
        try:
            trained(method, tmp_path)
        except UserError as error:
            assert str(tmp_path / path.name) in str(error)


def test_a_good_memory_is_taken(memory, trained):
    method, path = memory
    (taken,) = trained(method, path.parent).methods
    first = taken.memories[0] if method == "gem" else taken.memory
    assert len(first) == 4 and (method == "gem" or first.seen == 16)


@pytest.mark.parametrize("method", ["ewc", "si", "rwalk"])
def test_importance_without_its_anchor_is_told_before_training(method, trained, tmp_path):
    trained(method).methods[0].save(tmp_path)
    path = tmp_path / f"{method}.safetensors"
    state = load_file(path)
    del state[max(name for name in state if name.startswith("anchor."))]
    save_file(state, path)
    with pytest.raises(UserError, match="has the importance or the anchor alone"):
        trained(method, tmp_path)
