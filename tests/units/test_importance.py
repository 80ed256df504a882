"""Importance: a case computed by hand, what must not change it, its normalisations, its file."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from das_lm.data.blocks import TrainingBlocks
from das_lm.data.collating import PaddingCollator
from das_lm.data.masking import MLMMasking
from das_lm.errors import UserError
from das_lm.model.objective import run_language_model
from das_lm.units import Architecture, Units
from das_lm.units.importance import FILE_NAME, Importance, measure_importance, normalize
from tests.helpers import VOCABULARY, random_batch, random_blocks, rewrite_importance, tiny_roberta

# ---- by hand -------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Two features, each the product of its input with the gates of one head, one neuron and one output neuron."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(model_type="chain", heads=2)
        layer = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("into", "out", "up", "down")})
        for projection in layer.values():
            nn.init.eye_(projection.weight)
        self.layers, self.head = nn.ModuleList([layer]), nn.Identity()
        self.base_model = SimpleNamespace(get_submodule=self.get_submodule)

    def forward(self, inputs):
        for name in ("into", "out", "up", "down"):
            inputs = self.layers[0][name](inputs)
        return inputs


CHAIN = Architecture("layers", {"into": "head"}, "out", {"up": "neuron"}, "down", "head", heads="heads")
#: Three examples of two tokens of two features. ∂(mean over tokens of 10·x₀ + x₁)/∂g is [10, 1] × the mean token.
EXAMPLES = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[-6.0, 1.0], [-2.0, 0.0]], [[0.0, -5.0], [0.0, -1.0]]])
ABSOLUTE = torch.tensor([10 * (2 + 4 + 0) / 3, (3 + 0.5 + 3) / 3])
SIGNED = torch.tensor([10 * (2 - 4 + 0) / 3, (3 + 0.5 - 3) / 3])


def chain_importance(sizes=(3,), views=1, combine=None, **options):
    model = Chain()

    def losses(batch):
        hidden = model(batch["input_ids"].repeat(views, 1, 1))
        value = (hidden @ torch.tensor([10.0, 1.0])).mean(dim=1)
        return value if combine is None else combine(*value.chunk(views))

    batches = [{"input_ids": examples} for examples in EXAMPLES.split(list(sizes))]
    return measure_importance(Units(model, CHAIN), batches, losses, views=views, **options)


def test_by_hand():
    """The mean over examples of the absolute gradient, for all three kinds of units alike."""
    raw = chain_importance()
    assert list(raw) == ["layers.0.head", "layers.0.intermediate", "layers.0.output"]
    for value in raw.values():
        torch.testing.assert_close(value, ABSOLUTE)


def test_signed():
    """`signed` averages the gradients themselves: opposite examples cancel."""
    for value in chain_importance(accumulation="signed").values():
        torch.testing.assert_close(value, SIGNED)


def test_unequal_batches():
    """The mean is over examples, not over batches."""
    for value in chain_importance(sizes=(2, 1)).values():
        torch.testing.assert_close(value, ABSOLUTE)


def test_views_share_a_gate():
    """Two views of an example: their gradients meet in one gate before the absolute value is taken."""
    together = chain_importance(views=2, combine=lambda first, second: first + second)
    against = chain_importance(views=2, combine=lambda first, second: first - second)
    weighted = chain_importance(views=2, combine=lambda first, second: first - 3 * second)
    for key in together:
        torch.testing.assert_close(together[key], 2 * ABSOLUTE)
        torch.testing.assert_close(against[key], torch.zeros(2))
        torch.testing.assert_close(weighted[key], 2 * ABSOLUTE)


def test_reduced_over_processes():
    """Sums and the number of examples are reduced: a second process with the same data changes nothing, one that
    counts twice as many examples would."""
    calls = []

    def double(total):
        calls.append(total.shape)
        return total * 2

    for value in chain_importance(reduce=double).values():
        torch.testing.assert_close(value, ABSOLUTE)
    assert len(calls) == 4 and torch.Size([]) in calls


# ---- what must not change it ---------------------------------------------------------------------------------------


def mlm_importance(model, examples, size, **options):
    units = Units(model)

    def losses(batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return run_language_model(model, units, inputs, batch["labels"]).row_means(len(batch["input_ids"]))

    batches = [pad(examples[start : start + size]) for start in range(0, len(examples), size)]
    return measure_importance(units, batches, losses, **options)


def pad(rows):
    length = max(len(row["input_ids"]) for row in rows)
    padded = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    return {
        name: torch.stack([nn.functional.pad(row[name], (0, length - len(row[name])), value=value) for row in rows])
        for name, value in padded.items()
    }


@pytest.fixture(scope="module")
def examples():
    """Eight examples of different lengths."""
    lengths = [12, 5, 9, 7, 12, 6, 8, 11]
    batch = random_batch(lengths)
    return [
        {name: batch[name][row, :length] for name in ("input_ids", "attention_mask", "labels")}
        for row, length in enumerate(lengths)
    ]


def test_batch_size_and_padding_change_nothing(examples):
    model = tiny_roberta().eval()
    alone = mlm_importance(model, examples, 1)
    for size in (3, 8):
        for key, value in mlm_importance(model, examples, size).items():
            torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-7)
    for value in alone.values():
        assert value.min() > 0


def test_signed_is_smaller_than_absolute(examples):
    model = tiny_roberta().eval()
    absolute = mlm_importance(model, examples, 4)
    signed = mlm_importance(model, examples, 4, accumulation="signed")
    for key in absolute:
        assert (signed[key].abs() <= absolute[key] + 1e-6).all() and (signed[key] < 0).any()
        assert signed[key].abs().mean() < 0.8 * absolute[key].mean()


def test_parameters_record_no_gradient_and_are_left_as_they_were(examples):
    model = tiny_roberta().eval()
    frozen = model.roberta.embeddings.word_embeddings.weight.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    recording = []
    model.roberta.encoder.layer[0].register_forward_hook(
        lambda *_: recording.extend(p for p in model.parameters() if p.requires_grad)
    )
    mlm_importance(model, examples, 4)
    assert not recording
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == (parameter is not frozen), name
        assert torch.equal(parameter, before[name])


def test_requires_grad_comes_back_after_an_error(examples):
    model = tiny_roberta().eval()
    with pytest.raises(KeyError):
        measure_importance(Units(model), [pad(examples)], lambda batch: batch["no such column"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_checkpointing_changes_nothing(examples):
    model = tiny_roberta().eval()
    plain = mlm_importance(model, examples, 4)
    model = tiny_roberta().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for key, value in mlm_importance(model, examples, 4).items():
        torch.testing.assert_close(value, plain[key])


# ---- normalisation and accumulation --------------------------------------------------------------------------------

RAW = torch.tensor([2.0, 0.0, 3.0, 1.0])
Z = [0.5 / math.sqrt(5 / 3), -1.5 / math.sqrt(5 / 3), 1.5 / math.sqrt(5 / 3), -0.5 / math.sqrt(5 / 3)]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("paper", [abs(math.tanh(z)) for z in Z]),
        ("rank", [2 / 3, 0, 1, 1 / 3]),
        ("positive", [max(0.0, math.tanh(z)) for z in Z]),
    ],
)
def test_normalize(how, expected):
    torch.testing.assert_close(normalize(RAW, how), torch.tensor(expected))


def test_a_strong_negative_gradient_is_important_in_order():
    """Signed gradients as `rank` and `positive` order them: by their absolute value. `paper` takes the sign."""
    signed = torch.tensor([-3.0, 0.5, 2.0, -1.0])
    torch.testing.assert_close(normalize(signed, "rank"), torch.tensor([1, 0, 2 / 3, 1 / 3]))
    torch.testing.assert_close(normalize(signed, "positive"), normalize(signed.abs(), "positive"))
    assert normalize(signed, "positive").argmax() == 0 and normalize(signed, "positive")[0] > 0.8
    z = (signed - signed.mean()) / signed.std()
    torch.testing.assert_close(normalize(signed, "paper"), z.tanh().abs())


@pytest.mark.parametrize("how", ["paper", "rank", "positive"])
def test_constant_becomes_zeros(how):
    """Also a single unit: neither NaN nor a mask."""
    assert torch.equal(normalize(torch.full((5,), 0.3), how), torch.zeros(5))
    assert torch.equal(normalize(torch.tensor([0.3]), how), torch.zeros(1))


@pytest.mark.parametrize("how", ["paper", "rank", "positive"])
def test_normalized_is_in_range_and_ignores_scale(how):
    raw = torch.rand(50, generator=torch.Generator().manual_seed(0)) ** 4
    value = normalize(raw, how)
    assert value.min() >= 0 and value.max() <= 1 and not value.isnan().any()
    torch.testing.assert_close(normalize(raw * 1e-6, how), value, rtol=1e-4, atol=1e-5)


def test_ties_share_their_mean_rank():
    raw = torch.tensor([5.0, 1.0, 3.0, 1.0, 5.0, 5.0])
    torch.testing.assert_close(normalize(raw, "rank"), torch.tensor([4, 0.5, 2, 0.5, 4, 4]) / 5)


def test_paper_is_not_monotone_and_the_others_are():
    """METHODS §1, trap 2: |tanh z| protects the least important units too."""
    raw = torch.linspace(0, 1, 11)
    assert normalize(raw, "paper")[0] == pytest.approx(normalize(raw, "paper")[-1].item(), abs=1e-5)
    for how in ("rank", "positive"):
        assert (normalize(raw, how).diff() >= 0).all()


KINDS = {"head": 4, "output": 50}


def test_emax():
    """I^(≤t) is the element-wise maximum over the domains, each of which is kept."""
    raws = {
        "general": [4.0, 3.0, 2.0, 1.0, 0.0],
        "bio": [0.0, 1.0, 2.0, 3.0, 4.0],
        "cs": [0.0, 0.0, 9.0, 0.0, 0.0],
    }
    importance = Importance("rank")
    for domain, raw in raws.items():
        importance.accumulate(domain, {"layers.0.head": torch.tensor(raw)})
    # ranks: [1, .75, .5, .25, 0], [0, .25, .5, .75, 1], [.375, .375, 1, .375, .375]
    torch.testing.assert_close(importance.values["layers.0.head"], torch.tensor([1, 0.75, 1, 0.75, 1]))
    torch.testing.assert_close(
        importance.by_domain[-1]["layers.0.head"], torch.tensor([0.375, 0.375, 1, 0.375, 0.375])
    )
    assert importance.domains == ["general", "bio", "cs"]


def test_saturation_is_the_mean_over_all_units_of_a_kind():
    importance = Importance(
        "rank",
        values={
            "layers.0.head": torch.tensor([1.0, 0.0]),
            "layers.1.head": torch.tensor([0.5, 0.5, 1.0, 0.0]),
            "layers.0.output": torch.tensor([0.25]),
        },
    )
    assert importance.saturation() == {"head": pytest.approx(0.5), "output": pytest.approx(0.25)}


def test_maps_are_what_people_look_at():
    """Means of bins of neighbours by layer, and the rank correlation of the domains over all layers of a kind."""
    draw = torch.Generator().manual_seed(3)
    importance = Importance("positive")
    for domain in ("general", "bio"):
        raw = {f"layers.{n}.{kind}": torch.rand(size, generator=draw) for n in (0, 1) for kind, size in KINDS.items()}
        importance.accumulate(domain, raw)
    maps = importance.maps(bins=10)
    assert maps["domains"] == ["general", "bio"] and set(maps["maps"]) == set(KINDS) == set(maps["overlap"])
    for name, part in (("bio", importance.by_domain[1]), ("accumulated", importance.values)):
        assert maps["maps"]["head"][name] == [
            pytest.approx(part[f"layers.{layer}.head"].tolist(), abs=1e-4) for layer in (0, 1)
        ]
        binned = [part[f"layers.{layer}.output"].view(10, 5).mean(1).tolist() for layer in (0, 1)]
        assert maps["maps"]["output"][name] == [pytest.approx(row, abs=1e-4) for row in binned]
    rows = [torch.cat([part[f"layers.{layer}.output"] for layer in (0, 1)]).numpy() for part in importance.by_domain]
    expected = spearmanr(*rows).statistic
    overlap = maps["overlap"]["output"]
    assert overlap[0][1] == overlap[1][0] == pytest.approx(expected, abs=1e-4) and overlap[0][0] == 1.0


# ---- the file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """Units, importance of two domains, and the directory where it was saved."""
    units = Units(tiny_roberta())
    importance, generator = Importance("positive", accumulation="signed"), torch.Generator().manual_seed(0)
    for domain in ("general", "bio"):
        importance.accumulate(domain, {k: torch.rand(n, generator=generator) for k, n in units.sizes.items()})
    importance.save(tmp_path / FILE_NAME, units)
    return units, importance, tmp_path


def test_round_trip(saved):
    units, importance, directory = saved
    for path in (directory, directory / FILE_NAME, str(directory)):
        loaded = Importance.load(path, units)
        assert (loaded.normalization, loaded.accumulation) == ("positive", "signed") and loaded.domains == [
            "general",
            "bio",
        ]
        assert len(loaded.by_domain) == 2
        parts = zip([loaded.values, *loaded.by_domain], [importance.values, *importance.by_domain], strict=True)
        for ours, theirs in parts:
            assert ours.keys() == theirs.keys() == units.sizes.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(not torch.equal(loaded.values[key], loaded.by_domain[-1][key]) for key in units.sizes)
    assert sorted(path.name for path in directory.iterdir()) == [FILE_NAME]


def test_metadata(saved):
    units, _, directory = saved
    with safe_open(directory / FILE_NAME, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["version"] == "1" and metadata["model_type"] == "roberta"
    assert json.loads(metadata["units"]) == units.sizes and json.loads(metadata["domains"]) == ["general", "bio"]
    assert metadata["normalization"] == "positive" and metadata["accumulation"] == "signed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 8}, r"layers\.0\.head has 4 units there and 8 in this model"),
        ({"num_hidden_layers": 3}, r"layers\.2\.head has 0 units there and 4 in this model"),
        ({"num_hidden_layers": 1}, r"layers\.1\.head has 4 units there and 0 in this model"),
        ({"intermediate_size": 48}, r"layers\.0\.intermediate has 64 units there and 48 in this model"),
    ],
)
def test_another_shape_names_the_first_layer_that_differs(saved, change, message):
    with pytest.raises(UserError, match=message):
        Importance.load(saved[2], Units(tiny_roberta(**change)))


def test_another_model_type(saved):
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    with pytest.raises(UserError, match="of a 'roberta' model, this one is 'bert'"):
        Importance.load(saved[2], Units(BertForMaskedLM(config)))


def test_no_safetensors_file(saved):
    (saved[2] / FILE_NAME).write_bytes(b"PK\x03\x04 this is a zip file of something else")
    with pytest.raises(UserError, match=f"{FILE_NAME} cannot be read"):
        Importance.load(saved[2], saved[0])


def test_truncated_file(saved):
    path = saved[2] / FILE_NAME
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{FILE_NAME} cannot be read"):
        Importance.load(saved[2], saved[0])


def test_safetensors_of_something_else(saved):
    save_file({"weight": torch.zeros(2)}, saved[2] / FILE_NAME)
    with pytest.raises(UserError, match="is no importance file"):
        Importance.load(saved[2], saved[0])


def test_missing_file(saved, tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path / "none"):
        with pytest.raises(UserError, match=f"there is no file .*{path.name}; use 'proxy'"):
            Importance.load(path, saved[0])
    (saved[2] / FILE_NAME).unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe or a device"):
        Importance.load(tmp_path / "pipe", saved[0])
    with pytest.raises(UserError, match="there is no file .*importance.safetensors"):
        Importance.load(saved[2], saved[0])


def test_a_file_of_before_does_not_say_how_gradients_were_accumulated(saved):
    rewrite_importance(saved[2] / FILE_NAME, saved[2] / FILE_NAME, accumulation=None)
    assert Importance.load(saved[2], saved[0]).accumulation is None
    rewrite_importance(saved[2] / FILE_NAME, saved[2] / FILE_NAME, accumulation="cubed")
    with pytest.raises(UserError, match="there is no accumulation 'cubed'"):
        Importance.load(saved[2], saved[0])


def test_newer_version(saved):
    path = saved[2] / FILE_NAME
    rewrite_importance(path, path, version="2")
    with pytest.raises(UserError, match="has version 2; this release reads 1"):
        Importance.load(path, saved[0])


def test_collated_blocks_and_loose_rows_agree(tiny_tokenizer):
    """Through the package's own masking and collator: blocks of two lengths, in batches of 1 and of 5."""
    long, short = random_blocks(3, 12), random_blocks(2, 8)
    blocks = TrainingBlocks({"a": long, "b": short}, MLMMasking(tiny_tokenizer, 0.3), seed=0)
    rows = [blocks[index] for index in range(5)]
    model, collate = tiny_roberta().eval(), PaddingCollator(tiny_tokenizer)
    units = Units(model)

    def losses(batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return run_language_model(model, units, inputs, batch["labels"]).row_means(len(batch["input_ids"]))

    together = measure_importance(units, [collate(rows)], losses)
    alone = measure_importance(units, [collate([row]) for row in rows], losses)
    for key in together:
        torch.testing.assert_close(together[key], alone[key], rtol=1e-4, atol=1e-7)
