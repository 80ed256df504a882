"""Blocks and windows: what is drawn at random is a pure function of its address."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from das_lm.data.blocks import HeldOutWindows, TrainingBlocks
from das_lm.data.collating import PaddingCollator
from das_lm.data.masking import MLMMasking
from das_lm.errors import UserError
from das_lm.randomness import addressed_seed
from tests.helpers import BOS, EOS, MASK, PAD, SPECIAL_TOKENS, VOCABULARY, random_blocks

IGNORED = -100


@pytest.fixture(scope="module")
def masking(tiny_tokenizer):
    return MLMMasking(tiny_tokenizer, 0.15)


def training_blocks(masking, schedule="sequential", seed=0, **sizes):
    sizes = sizes or {"bio": 10}
    domains = {name: random_blocks(size, seed=index) for index, (name, size) in enumerate(sizes.items())}
    return TrainingBlocks(domains, masking, seed, schedule)


def original(row):
    """A block's tokens before masking, which make it recognisable."""
    return tuple(np.where(row["labels"] == IGNORED, row["input_ids"], row["labels"]).tolist())


def contents(blocks):
    """Everything that an epoch shows, as plain data."""
    rows = (blocks[index] for index in range(len(blocks)))
    return [(row["input_ids"].tolist(), row["labels"].tolist(), int(row["example_id"])) for row in rows]


# ---- masks ---------------------------------------------------------------------------------------------------------


def test_shares(masking):
    """15 % predicted; of these 80 % masked, 10 % random, 10 % unchanged, up to chance."""
    ids = np.random.default_rng(0).integers(len(SPECIAL_TOKENS), VOCABULARY, size=200_000)
    masked, labels = masking(ids, seed=1)
    predicted = labels != IGNORED
    assert np.array_equal(labels[predicted], ids[predicted])
    assert np.array_equal(masked[~predicted], ids[~predicted])
    count = predicted.sum()
    assert count / len(ids) == pytest.approx(0.15, abs=0.003)
    random_token = 0.1 / VOCABULARY  # a random token is each of the vocabulary alike, the mask and the old one too
    assert (masked[predicted] == MASK).sum() / count == pytest.approx(0.8 + random_token, abs=0.01)
    assert (masked[predicted] == ids[predicted]).sum() / count == pytest.approx(0.1 + random_token, abs=0.007)
    other = masked[predicted & (masked != ids) & (masked != MASK)]
    assert len(other) / count == pytest.approx(0.1 - 2 * random_token, abs=0.007)
    assert len(np.unique(other)) == VOCABULARY - 1


@pytest.mark.parametrize("probability", [0.05, 0.5, 1.0])
def test_probability(probability, tiny_tokenizer):
    ids = np.random.default_rng(0).integers(len(SPECIAL_TOKENS), VOCABULARY, size=50_000)
    _, labels = MLMMasking(tiny_tokenizer, probability)(ids, seed=1)
    assert (labels != IGNORED).mean() == pytest.approx(probability, abs=0.01)


def test_special_tokens_are_never_predicted(tiny_tokenizer):
    masking = MLMMasking(tiny_tokenizer, 1.0)
    ids = np.tile(np.array([BOS, 10, 11, MASK, EOS, PAD, 3, 12]), 50)
    masked, labels = masking(ids, seed=0)
    special = ids < len(SPECIAL_TOKENS)
    assert (labels[special] == IGNORED).all() and (labels[~special] == ids[~special]).all()
    assert np.array_equal(masked[special], ids[special])


def test_at_least_one_token_is_predicted(tiny_tokenizer):
    """Where chance chooses none, one ordinary token; where there is no ordinary token, none."""
    masking = MLMMasking(tiny_tokenizer, 0.01)
    ids = np.array([BOS, 10, 11, 12, EOS])
    positions = [np.flatnonzero(masking(ids, seed)[1] != IGNORED).tolist() for seed in range(60)]
    assert all(len(found) == 1 and ids[found[0]] >= len(SPECIAL_TOKENS) for found in positions)
    assert {found[0] for found in positions} == {1, 2, 3}
    assert (masking(np.array([BOS, EOS]), 0)[1] == IGNORED).all()


def test_input_is_not_changed_in_place(masking):
    ids = np.arange(5, 60)
    before = ids.copy()
    masking(ids, 0)
    assert np.array_equal(ids, before)


def test_tokenizer_without_mask_token(tiny_tokenizer):
    causal = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, unk_token="<unk>")
    with pytest.raises(UserError, match="no mask token"):
        MLMMasking(causal, 0.15)


# ---- addresses -----------------------------------------------------------------------------------------------------


def test_addressed_seed_is_the_same_everywhere():
    """Pinned: another value would change what a resumed run sees after an upgrade."""
    assert addressed_seed(1, "bio", 0, 3) == 16445867613750502997
    assert len({addressed_seed(*a) for a in [(1, 23), (12, 3), ("1", 23), (1, "23"), (123,), (1, 2, 3)]}) == 6


#: Needs torch alone, which starts faster than transformers and datasets.
SCRIPT = """
from das_lm.data.blocks import TrainingBlocks
from das_lm.data.masking import MLMMasking

class Tokenizer:
    mask_token_id, all_special_ids = 4, [0, 1, 2, 3, 4]
    def __len__(self):
        return 64

class Blocks(list):
    def with_format(self, _):
        return self

def blocks_of(name, count):
    return Blocks({"input_ids": [0, *range(5 + block, 17 + block), 2]} for block in range(count))

domains = {name: blocks_of(name, count) for name, count in (("bio", 6), ("cs", 4))}
blocks = TrainingBlocks(domains, MLMMasking(Tokenizer(), 0.3), seed=3, schedule="interleaved")
blocks.set_epoch(2)
rows = [blocks[index] for index in range(len(blocks))]
found = str([(row["input_ids"].tolist(), row["labels"].tolist(), row["example_id"]) for row in rows])
"""


def test_another_process_sees_the_same(pytestconfig):
    """Order, masks and ids are those of this process, whatever it drew before."""
    ours = {}
    exec(SCRIPT, ours)
    assert len(ours["rows"]) == 10
    command = [sys.executable, "-c", f"{SCRIPT}\nprint(found)"]
    result = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ours["found"]


def test_masks_do_not_depend_on_order_of_access(masking):
    blocks = training_blocks(masking)
    forwards = contents(blocks)
    backwards = [blocks[index] for index in reversed(range(len(blocks)))][::-1]
    assert [row["input_ids"].tolist() for row in backwards] == [ids for ids, _, _ in forwards]


@pytest.mark.parametrize("change", ["epoch", "seed"])
def test_another_epoch_or_seed_has_other_masks_and_another_order(masking, change):
    first = training_blocks(masking, bio=10)
    second = training_blocks(masking, bio=10, **({"seed": 1} if change == "seed" else {}))
    second.set_epoch(1 if change == "epoch" else 0)
    rows = [[blocks[index] for index in range(10)] for blocks in (first, second)]
    orders = [[original(row) for row in some] for some in rows]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    masks = [{original(row): row["labels"].tolist() for row in some} for some in rows]
    assert sum(masks[0][key] != masks[1][key] for key in masks[0]) >= 8


def by_text(rows):
    return {original(row): (row["input_ids"].tolist(), row["labels"].tolist(), int(row["example_id"])) for row in rows}


def test_domains_draw_apart(masking):
    """The same text in two domains has other masks, another order and other ids."""
    same = random_blocks(10)
    blocks = TrainingBlocks({"bio": same, "cs": same}, masking, 0)
    rows = [blocks[index] for index in range(20)]
    bio, cs = by_text(rows[:10]), by_text(rows[10:])
    assert bio.keys() == cs.keys() and list(bio) != list(cs)
    assert sum(bio[text][1] != cs[text][1] for text in bio) >= 8
    assert not {example for *_, example in bio.values()} & {example for *_, example in cs.values()}


def test_masks_are_of_the_block_wherever_it_stands(masking):
    """Two schedules show the same blocks in another order, each with its own masks."""
    rows = []
    for schedule in ("alternating", "interleaved"):
        blocks = training_blocks(masking, schedule, bio=10, cs=10)
        rows.append(by_text(blocks[index] for index in range(20)))
    assert rows[0] == rows[1] and list(rows[0]) != list(rows[1])


def test_example_id_is_of_the_block_alone(masking):
    """It names a block across epochs and seeds, so that draws by example can be repeated; it fits int64."""
    ids = []
    for seed, epoch in ((0, 0), (0, 3), (5, 0)):
        blocks = training_blocks(masking, bio=10, seed=seed).at(epoch)
        ids.append({original(blocks[index]): blocks[index]["example_id"] for index in range(10)})
    assert ids[0] == ids[1] == ids[2] and len(set(ids[0].values())) == 10
    assert all(0 <= value < 2**63 for value in ids[0].values())


def test_at_leaves_the_epoch_of_training_alone(masking):
    blocks = training_blocks(masking)
    before = contents(blocks)
    elsewhere = contents(blocks.at(-1))
    assert contents(blocks) == before != elsewhere
    blocks.set_epoch(4)
    assert contents(blocks.at(0)) == before


# ---- schedules -----------------------------------------------------------------------------------------------------


def epoch_domains(blocks):
    """The domain of every block in the order of the epoch."""
    names = {tuple(row["input_ids"].tolist()): name for name, data in blocks.domains.items() for row in data}
    return [names[original(blocks[index])] for index in range(len(blocks))]


@pytest.mark.parametrize("schedule", ["sequential", "alternating", "interleaved"])
def test_every_block_exactly_once_per_epoch(masking, schedule):
    blocks = training_blocks(masking, schedule, bio=13, cs=8)
    assert len(blocks) == 21
    everything = sorted(tuple(row["input_ids"].tolist()) for data in blocks.domains.values() for row in data)
    for epoch in (0, 1, 7):
        blocks.set_epoch(epoch)
        assert sorted(original(blocks[index]) for index in range(21)) == everything


def test_alternating_takes_one_domain_after_the_other(masking):
    blocks = training_blocks(masking, "alternating", bio=13, cs=8)
    for epoch in range(3):
        blocks.set_epoch(epoch)
        assert epoch_domains(blocks) == ["bio"] * 13 + ["cs"] * 8


def test_interleaved_mixes(masking):
    """In every stretch of the epoch both domains, and another mixture in the next epoch."""
    blocks = training_blocks(masking, "interleaved", bio=40, cs=40)
    orders = []
    for epoch in range(2):
        blocks.set_epoch(epoch)
        orders.append(epoch_domains(blocks))
        for start in range(0, 80, 20):
            assert 4 <= orders[-1][start : start + 20].count("bio") <= 16
    assert orders[0] != orders[1]


def test_persistent_workers_see_the_epoch(masking):
    """A data-loader worker that lives on has its own copy of the data set; the epoch reaches it all the same."""
    blocks = training_blocks(masking)
    loader = DataLoader(blocks, batch_size=1, num_workers=1, persistent_workers=True, collate_fn=lambda rows: rows[0])
    for epoch in (0, 1, 0, 5):
        blocks.set_epoch(epoch)
        seen = [(row["input_ids"].tolist(), row["labels"].tolist(), int(row["example_id"])) for row in loader]
        assert seen == contents(blocks.at(epoch))


# ---- held-out windows ----------------------------------------------------------------------------------------------


def windows_of(rows, masking, seed=0):
    data = Dataset.from_dict({"input_ids": rows, "document": list(range(len(rows)))})
    held_out = HeldOutWindows(data, masking, seed)
    return [held_out[index] for index in range(len(held_out))]


ROWS = [[BOS, *range(5, 5 + length), EOS] for length in (20, 6, 31, 12, 20)]


def by_document(rows):
    return {original(row): (row["input_ids"].tolist(), row["labels"].tolist()) for row in rows}


def test_held_out_masks_depend_on_the_text_alone(masking):
    """Neither on order nor on what else is held out."""
    whole = by_document(windows_of(ROWS, masking))
    assert by_document(windows_of(ROWS[::-1], masking)) == whole
    for row in ROWS:
        (alone,) = by_document(windows_of([row], masking)).values()
        assert alone == whole[tuple(row)]


def test_held_out_masks_depend_on_the_seed(masking):
    first, second = by_document(windows_of(ROWS, masking)), by_document(windows_of(ROWS, masking, seed=1))
    assert sum(first[key] != second[key] for key in first) >= 3


def test_held_out_windows_come_longest_first_with_their_documents(masking):
    rows = windows_of(ROWS, masking)
    lengths = [len(row["input_ids"]) for row in rows]
    assert lengths == sorted(lengths, reverse=True)
    assert [row["document"] for row in rows] == [2, 0, 4, 3, 1]
    assert all(original(row) == tuple(ROWS[row["document"]]) for row in rows)


# ---- collator ------------------------------------------------------------------------------------------------------


def test_collator_pads(tiny_tokenizer):
    rows = [
        {"input_ids": np.array([BOS, 7, 8, EOS]), "labels": np.array([-100, 9, -100, -100]), "document": 3},
        {"input_ids": np.array([BOS, EOS]), "labels": np.array([-100, -100]), "document": 5},
    ]
    batch = PaddingCollator(tiny_tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[BOS, 7, 8, EOS], [BOS, EOS, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 9, -100, -100], [-100] * 4]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["document"].tolist() == [3, 5]
    assert {value.dtype for value in batch.values()} == {torch.int64}
