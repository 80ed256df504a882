"""Per-example gradients: equal to a loop over examples, on every architecture, by the fast and by the slow way."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from das_lm.methods.per_example import PerExample
from das_lm.model.objective import run_language_model
from das_lm.units import Units
from tests.helpers import random_batch, tiny_roberta
from tests.units.test_architectures import CONFIGS, build, hooks

STATISTICS = {"square": torch.square, "absolute": torch.abs}


def looped(model, losses, statistic):
    """The same by one backward pass per example; zeros where nothing arrives."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for loss in losses():
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                total += STATISTICS[statistic](gradient)
    return sums


def assert_same(ours, theirs, tolerance=1e-5):
    """To `tolerance` of the largest value of each parameter: those that are 0 but for rounding are told by the model's
    largest one."""
    assert ours.keys() == theirs.keys()
    largest = max(value.abs().max() for value in theirs.values())
    for name, value in theirs.items():
        bound = tolerance * value.abs().max() + 1e-8 * largest
        assert ours[name].dtype == torch.float32 and ours[name].shape == value.shape
        assert (ours[name] - value).abs().max() <= bound, name


def check(model, rows, losses, statistic="square", flattened=None, exact=(), **options):
    """Add the same batch twice, since only the first is verified, and compare with the loop."""
    per_example = PerExample(model, statistic, **options)
    expected = looped(model, losses, statistic)
    for times in (1, 2):
        per_example.add(rows, losses, flattened)
        assert_same(per_example.sums, {name: times * value for name, value in expected.items()})
    assert per_example.examples == 2 * rows
    assert per_example.exact == set(exact)
    return per_example


def classification(model, inputs, classes=5, seed=3):
    """Cross-entropy of random labels, the mean over positions, if there are any."""
    labels = torch.randint(classes, inputs.shape[:2], generator=torch.Generator().manual_seed(seed))

    def losses():
        outputs = model(inputs)
        if outputs.ndim == 2:
            return F.cross_entropy(outputs, labels[:, 0], reduction="none")
        return F.cross_entropy(outputs.mT, labels, reduction="none").mean(dim=1)

    return losses


def mlp(bias=True, activation=nn.ReLU, **options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 6, bias), activation(**options), nn.Linear(6, 6, bias), nn.LayerNorm(6), nn.Linear(6, 5, bias)
    )


# ---- modules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 7)], ids=["vectors", "sequences"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_mlp(bias, shape, statistic):
    model = mlp(bias)
    check(model, 4, classification(model, torch.randn(shape)), statistic)


def test_activation_in_place():
    model = mlp(inplace=True)
    check(model, 4, classification(model, torch.randn(4, 7)))


def test_conv1d():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 7), nn.GELU(), Conv1D(5, 6))
    for shape in ((4, 7), (4, 3, 7)):
        check(model, 4, classification(model, torch.randn(shape)))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_convolution(statistic):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    check(model, 3, classification(model, torch.randn(3, 2, 7, 7)), statistic, exact=["2.weight", "2.bias"])


class Gain(nn.Module):
    """Root-mean-square normalisation with 1 + weight."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, inputs):
        return inputs * inputs.square().mean(dim=-1, keepdim=True).rsqrt() * (1 + self.weight)


@pytest.mark.parametrize("norm", [nn.RMSNorm, Gain, nn.LayerNorm])
def test_norms(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), norm(6), nn.Tanh(), norm(6), nn.Linear(6, 5))
    check(model, 4, classification(model, torch.randn(4, 3, 7)))


class Words(nn.Module):
    """A tied language model whose hidden layer is used twice; positions are embedded once for all rows."""

    def __init__(self, padding=0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.positions = nn.Embedding(11, 6, padding_idx=padding), nn.Embedding(8, 6)
        self.hidden, self.decoder = nn.Linear(6, 6), nn.Linear(6, 11)
        self.decoder.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight)

    def forward(self, ids):
        hidden = self.embedding(ids) + self.positions(torch.arange(ids.shape[1])[None])
        return self.decoder(self.hidden(self.hidden(hidden).tanh()))


IDS = torch.tensor([[1, 2, 3, 2, 0], [4, 4, 4, 1, 5], [9, 10, 2, 0, 0]])  # tokens come more than once; padding


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("chunk", [1, 11 * 6 * 2, 1 << 20])
def test_tied_embedding_shared_layer_and_chunks(statistic, chunk):
    """Uses of a parameter are summed before the square is taken, however few examples fit into the memory."""
    model = Words()
    check(model, 3, classification(model, IDS, 11), statistic, max_elements=chunk)


def test_untied_embedding():
    model = Words()
    model.decoder = nn.Linear(6, 11)
    check(model, 3, classification(model, IDS, 11), "absolute")


def test_tied_biases_and_shared_layer_of_vectors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 5))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    assert list(check(model, 4, classification(model, torch.randn(4, 7))).sums) == [
        "0.weight",
        "0.bias",
        "4.weight",
        "4.bias",
    ]


def test_normalisation_over_channels_takes_the_slow_way():
    """A vector that does not lie along the last axis: of another length, and of the same length by chance."""
    torch.manual_seed(0)
    for width, exact in ((5, ["1.weight", "1.bias"]), (6, ["1.weight", "1.bias"])):
        model = nn.Sequential(nn.Linear(7, width), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(6 * width, 5))
        check(model, 4, classification(model, torch.randn(4, 6, 7)), exact=exact)


def test_parameter_used_outside_its_module():
    """A weight decays in the loss, too, and a bare parameter shifts the outputs."""
    model = mlp()
    model.shift = nn.Parameter(torch.randn(5))
    inputs = torch.randn(4, 7)
    plain = classification(lambda inputs: model[0:5](inputs) + model.shift, inputs)
    check(
        model,
        4,
        lambda: plain() + 0.1 * inputs[:, 0] * model[2].weight.square().sum(),
        "absolute",
        exact=["2.weight", "shift"],
    )


def test_unusual_call_takes_the_slow_way():
    model = nn.Linear(7, 5)
    check(model, 4, classification(lambda inputs: model(input=inputs), torch.randn(4, 7)), exact=["weight", "bias"])


class Time(nn.Module):
    """The axes of tokens and examples change places before the hidden layer."""

    def __init__(self):
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(7, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, inputs):
        return self.last(self.hidden(self.first(inputs).transpose(0, 1)).tanh().transpose(0, 1))


@pytest.mark.parametrize("tokens", [3, 4])
def test_axis_of_another_meaning_is_noticed(tokens):
    """Also where it is as long as the axis of examples, so that the sum over all examples would be right."""
    torch.manual_seed(0)
    model = Time()
    check(model, 4, classification(model, torch.randn(4, tokens, 7)), exact=["hidden.weight", "hidden.bias"])


def test_axis_that_fits_in_the_first_batch_only():
    """With one example, a table of positions has an axis of examples; with three it has none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5))
    model.table, model.project = nn.Parameter(torch.randn(1, 7)), nn.Linear(7, 5)
    per_example, expected = PerExample(model), []
    for rows in (1, 3):
        losses = classification(lambda inputs: model[0](inputs) + model.project(model.table), torch.randn(rows, 7))
        per_example.add(rows, losses)
        expected.append(looped(model, losses, "square"))
    assert_same(per_example.sums, {name: sum(part[name] for part in expected) for name in expected[0]})
    assert per_example.exact == {"table", "project.weight", "project.bias"}


def test_batch_normalisation():
    """In training mode it couples the examples, and what stands before it has no gradient per example to be seen at
    its module; in evaluation mode it does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 5))
    losses = classification(model, torch.randn(4, 7))
    check(model, 4, losses, exact=["0.weight", "0.bias", "1.weight", "1.bias"])
    model.eval()
    check(model, 4, losses, exact=["1.weight", "1.bias"])


def test_dropout():
    """The sums are those of what was drawn, which is drawn once."""
    model = mlp(activation=nn.Dropout)
    plain = classification(model, torch.randn(4, 7))

    def losses():
        torch.manual_seed(1)
        return plain()

    check(model, 4, losses)
    state = torch.get_rng_state()
    PerExample(model).add(4, plain)
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    plain()
    assert torch.equal(torch.get_rng_state(), drawn)


def test_hooks_of_others_on_outputs_and_inputs():
    """What a hook does to a module's output comes after the module, what it does to the input before."""
    model = mlp()
    model[2].register_forward_hook(lambda module, args, output: output * torch.arange(6))
    model[4].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    check(model, 4, classification(model, torch.randn(4, 7)))


class Opaque(torch.autograd.Function):
    """An operation that cannot be vectorised."""

    @staticmethod
    def forward(ctx, inputs):
        return inputs * 2

    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(gradient.numpy() * 2)


def test_operation_that_cannot_be_vectorised():
    model = mlp()
    model.shift = nn.Parameter(torch.randn(5))
    losses = classification(lambda inputs: Opaque.apply(model[0:5](inputs) + model.shift), torch.randn(4, 7))
    check(model, 4, losses, exact=["shift"])


# ---- language models -----------------------------------------------------------------------------------------------

POSITIONS = [r"encoder\.rel_embeddings\.weight"]
FLATTENED = (r"embed_positions\.weight", r"fc[12]\.")
EXPERTS = (r"mlp\.experts\.", r"mlp\.gate\.weight")  # a token goes to some experts only
#: What takes the slow way, as patterns: relative positions have no axis of examples, whatever shares a parameter with
#: them has none either, and the new head of DeBERTa uses the embeddings and a bias of its own outside of modules.
SLOW = {
    "deberta-v2": [*POSITIONS, r"self\.pos_(key|query)_proj\."],
    "deberta-v2, shared keys": [*POSITIONS, r"self\.(key|query)_proj\."],
    "deberta-v2, new head": [
        *POSITIONS,
        r"self\.pos_(key|query)_proj\.",
        r"word_embeddings\.weight",
        r"lm_head\.bias",
    ],
    "opt": [
        *FLATTENED,
        r"layers\.\d+\.final_layer_norm\.",
    ],  # its FFN sees [rows × tokens, features]; its positions are offset
    "opt, norms after, narrow embeddings": [*FLATTENED],
    "gemma2": [r"embed_tokens\.weight"],  # scaled after the lookup
    "mixtral": [*EXPERTS],
    "qwen3_moe": [*EXPERTS],
    "qwen3_moe, one layer without experts": [*EXPERTS],
    "gemma3_text": [r"embed_tokens\.weight"],
}


def language_model(name, lengths=(9, 7, 5), seed=0):
    """Model, losses of a padded batch with the head on the predicted tokens alone, and what is flattened there."""
    model, units = build(name) if isinstance(name, str) else (name, Units(name))
    batch = random_batch(list(lengths), seed)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def losses():
        return run_language_model(model, units, inputs, batch["labels"]).row_means(len(lengths))

    return model, losses, (units.lm_head, (batch["labels"] != -100).nonzero()[:, 0])


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("name", [*CONFIGS, "gpt2"])
def test_every_architecture(name, statistic):
    model, losses, flattened = language_model(name)
    slow = [key for key, _ in model.named_parameters() if any(re.search(end, key) for end in SLOW.get(name, []))]
    assert len(slow) >= len(SLOW.get(name, []))
    check(model, 3, losses, statistic, flattened, exact=slow)


def test_row_without_predictions_and_rows_in_any_order():
    """The head may see the predictions in any order, some rows many and some none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.LayerNorm(6), nn.Linear(6, 5))
    inputs, index, labels = (
        torch.randn(4, 3, 7),
        torch.tensor([3, 0, 3, 3, 0, 2, 3]),
        torch.tensor([0, 1, 2, 3, 4, 0, 1]),
    )

    def losses():
        hidden = model[0](inputs)[index, torch.arange(7) % 3]
        values = F.cross_entropy(model[2](model[1](hidden)), labels, reduction="none")
        return torch.zeros(4).index_add(0, index, values)

    for statistic in STATISTICS:
        check(model, 4, losses, statistic, (model[1], index))


def test_checkpointing_changes_nothing():
    model, losses, flattened = language_model(tiny_roberta())
    expected = looped(model, losses, "square")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    per_example = PerExample(model)
    per_example.add(3, losses, flattened)
    per_example.add(3, losses, flattened)
    assert_same(per_example.sums, {name: 2 * value for name, value in expected.items()})
    assert not per_example.exact


def test_autocast():
    """Half precision: the sums are those of single precision but for rounding, and nothing takes the slow way."""
    model, losses, flattened = language_model("bert")
    exact, per_example = looped(model, losses, "square"), PerExample(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            per_example.add(3, losses, flattened)
    assert not per_example.exact
    largest = max(value.max() for value in exact.values())
    for name, value in exact.items():
        ours = per_example.sums[name] / 2
        assert ours.dtype == torch.float32
        assert (ours - value).norm() <= 0.1 * value.norm() + 1e-6 * largest, name


# ---- what the sums mean --------------------------------------------------------------------------------------------


def test_fisher_of_softmax_regression():
    """The gradient of −log p(y|x) is (p − onehot(y)) ⊗ x."""
    torch.manual_seed(0)
    model, inputs, labels = nn.Linear(7, 5), torch.randn(20, 7), torch.randint(5, (20,))
    per_example = PerExample(model)
    per_example.add(20, lambda: F.cross_entropy(model(inputs), labels, reduction="none"))
    error = model(inputs).softmax(dim=1).detach() - F.one_hot(labels, 5)
    expected = {"weight": (error[:, :, None] * inputs[:, None, :]).square().sum(0), "bias": error.square().sum(0)}
    assert_same(per_example.sums, expected)


def test_duplicates_count_and_batches_do_not():
    """Twice the examples make twice the sum, in one batch or two. The square of the batch's gradient is another
    thing: much smaller, and the smaller the larger the batch."""
    torch.manual_seed(0)
    model, inputs, labels = mlp(), torch.randn(32, 7), torch.randint(5, (32,))

    def sums(copies, batches):
        per_example = PerExample(model)
        for x, y in zip(inputs.repeat(copies, 1).chunk(batches), labels.repeat(copies).chunk(batches), strict=True):
            per_example.add(len(x), lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none"))
        assert per_example.examples == 32 * copies
        return per_example.sums

    once = sums(1, 1)
    for copies, batches in ((1, 4), (2, 1), (3, 5)):
        assert_same(sums(copies, batches), {name: copies * value for name, value in once.items()})
    gradients = torch.autograd.grad(F.cross_entropy(model(inputs), labels), list(model.parameters()))
    for value, gradient in zip(once.values(), gradients, strict=True):
        assert gradient.square().sum() < 0.5 * value.sum() / 32


# ---- what is left alone --------------------------------------------------------------------------------------------


def test_frozen_parameters_are_left_out():
    model = mlp()
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    per_example = check(model, 4, classification(model, torch.randn(4, 7)))
    assert list(per_example.sums) == ["2.bias", "3.weight", "3.bias", "4.weight", "4.bias"]
    assert [p.requires_grad for p in model.parameters()] == [False, False, False, True, True, True, True, True]


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(fails):
    """Parameters, their gradients, what is frozen, the hooks: also after an exception, in the first batch or later."""
    model, losses, flattened = language_model("deberta-v2")
    frozen = model.deberta.embeddings.word_embeddings.weight.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.deberta.embeddings.register_forward_hook(lambda *_: None)
    hooks_before, per_example = hooks(model), PerExample(model)

    def failing():
        losses()
        raise RuntimeError("on purpose")

    for _ in range(2):
        if fails:
            with pytest.raises(RuntimeError, match="on purpose"):
                per_example.add(3, failing, flattened)
        per_example.add(3, losses, flattened)
        assert hooks(model) == hooks_before
        for name, parameter in model.named_parameters():
            assert parameter.grad is None and torch.equal(parameter, before[name])
            assert parameter.requires_grad == (parameter is not frozen), name
    assert per_example.examples == 6


def test_no_gradient_of_parameters_is_computed():
    """After the first batch, in which they are compared, parameters record none but those of the slow way."""
    model, losses, flattened = language_model("deberta-v2, shared keys")
    per_example, recording = PerExample(model), []
    per_example.add(3, losses, flattened)
    model.register_forward_hook(lambda *_: recording.extend(k for k, p in model.named_parameters() if p.requires_grad))
    per_example.add(3, losses, flattened)
    assert set(recording) == per_example.exact


def test_runs_without_gradients_outside():
    model = mlp()
    losses = classification(model, torch.randn(4, 7))
    expected, per_example = looped(model, losses, "square"), PerExample(model)
    with torch.no_grad():
        per_example.add(4, losses)
    assert_same(per_example.sums, expected)


def test_wrong_arguments():
    model = mlp()
    with pytest.raises(ValueError, match="statistic 'cube' is none of square, absolute"):
        PerExample(model, "cube")
    with pytest.raises(ValueError, match=r"shape \[\], not one for each of 4 examples"):
        PerExample(model).add(4, lambda: classification(model, torch.randn(4, 7))().mean())
