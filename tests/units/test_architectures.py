"""Every architecture of the table on a tiny model: are the units where the entry says, and the gates too?"""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SmolLM3Config,
    XLMRobertaConfig,
)

from das_lm.errors import UserError
from das_lm.model.objective import run_language_model
from das_lm.run.inspection import build_model
from das_lm.units import ARCHITECTURES, Architecture, Slice, Units, gated
from das_lm.units.contract import check_contract, randomize
from das_lm.units.discovery import _neuron_owners, head_owners, is_transposed
from das_lm.units.gates import ones
from das_lm.units.importance import Importance
from tests.helpers import BOS, EOS, PAD, VOCABULARY, random_batch, tiny_roberta

HIDDEN, HEADS, INTERMEDIATE, LAYERS = 32, 4, 64, 2
IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SHAPE = {
    **IDS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 40,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
DEBERTA = {**SHAPE, "relative_attention": True, "pos_att_type": "p2c|c2p", "position_biased_input": False}
OPT = {**SHAPE, "ffn_dim": INTERMEDIATE}
FALCON = {**SHAPE, "ffn_hidden_size": INTERMEDIATE}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "bert": BertConfig(**SHAPE),
    "roberta": RobertaConfig(**SHAPE),
    "xlm-roberta": XLMRobertaConfig(**SHAPE),
    "electra": ElectraConfig(**SHAPE, embedding_size=16),
    "distilbert": DistilBertConfig(
        **IDS, dim=HIDDEN, n_heads=HEADS, n_layers=LAYERS, hidden_dim=INTERMEDIATE, max_position_embeddings=40
    ),
    "deberta-v2": DebertaV2Config(**DEBERTA, share_att_key=False),
    "deberta-v2, shared keys": DebertaV2Config(**DEBERTA, share_att_key=True),
    "deberta-v2, new head": DebertaV2Config(**DEBERTA, share_att_key=False, legacy=False),
    "modernbert": ModernBertConfig(
        **SHAPE, global_attn_every_n_layers=2, local_attention=4, cls_token_id=BOS, sep_token_id=EOS
    ),
    "gpt2": GPT2Config(**IDS, n_embd=HIDDEN, n_head=HEADS, n_layer=LAYERS, n_inner=INTERMEDIATE, n_positions=40),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "gpt_neox, one after the other": GPTNeoXConfig(**SHAPE, use_parallel_residual=False, attention_bias=False),
    "opt": OPTConfig(**OPT, word_embed_proj_dim=HIDDEN),
    "opt, norms after, narrow embeddings": OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "falcon, one key for all": FalconConfig(**FALCON),
    "falcon, a key per head": FalconConfig(**FALCON, multi_query=False, alibi=True, bias=True, parallel_attn=False),
    "falcon, grouped": FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "llama": LlamaConfig(**GROUPED),
    "llama, biases, a key per head": LlamaConfig(
        **SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "mistral": MistralConfig(**GROUPED, sliding_window=4),
    "qwen2": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "smollm3": SmolLM3Config(**GROUPED, no_rope_layers=[1, 0]),
    "gemma2": Gemma2Config(**GROUPED, head_dim=16),
    "gemma3_text": Gemma3TextConfig(
        **GROUPED, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "olmo2": Olmo2Config(**GROUPED),
    "phi3": Phi3Config(**GROUPED),
    "mixtral": MixtralConfig(**EXPERTS),
    "qwen3_moe, one layer without experts": Qwen3MoeConfig(
        **EXPERTS, head_dim=16, moe_intermediate_size=16, mlp_only_layers=[0]
    ),
}
#: Layers whose intermediate neurons belong to experts.
EXPERT_LAYERS = {"mixtral": (0, 1), "qwen3_moe, one layer without experts": (1,)}
#: Query heads that read the same key and value.
SHARING = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "olmo2", "phi3"), [(0, 1), (2, 3)]
    ),
    **dict.fromkeys(("falcon, grouped", *EXPERT_LAYERS), [(0, 1), (2, 3)]),
    "falcon, one key for all": [(0, 1, 2, 3)],
}
LLAMA = ARCHITECTURES["llama"]


def build(name):
    """Model (dropout off) and units. All parameters are random, so that a misplaced one shows."""
    torch.manual_seed(0)
    model = build_model(copy.deepcopy(CONFIGS[name])).eval()
    randomize(model)
    return model, Units(model)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """Shared by the tests of a module: whoever changes the model puts it back."""
    return request.param, *build(request.param)


def groups_of(name):
    kinds = {"head": HEADS, "intermediate": INTERMEDIATE, "output": HIDDEN}
    return {
        f"layers.{layer}.{kind}": size
        for layer in range(LAYERS)
        for kind, size in kinds.items()
        if kind != "intermediate" or layer not in EXPERT_LAYERS.get(name, ())
    }


def logits(model, units=None, gates=None):
    inputs = {name: value for name, value in random_batch([9, 7]).items() if name in ("input_ids", "attention_mask")}
    with torch.no_grad(), gated(units, gates or {}):
        return model(**inputs).logits


def hooks(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]


# ---- the contract ------------------------------------------------------------------------------------------------


def test_the_table_is_covered():
    assert {config.model_type for config in CONFIGS.values()} == set(ARCHITECTURES)


def test_contract(case):
    """The contract holds, and checking it leaves the model as it was."""
    _, model, units = case
    before, hooks_before = {name: p.detach().clone() for name, p in model.named_parameters()}, hooks(model)
    assert {name: problems for name, problems in check_contract(units).items() if problems} == {}
    assert hooks(model) == hooks_before
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_unit_counts(case):
    name, _, units = case
    assert units.sizes == groups_of(name)


def test_every_projection_of_a_layer_is_owned_and_nothing_else(case):
    """All weights and biases of the layers' projections belong to units, but for the attention output's bias; of
    experts, what makes their output."""
    name, model, units = case
    expected = set()
    for path, module in model.named_modules():
        if f".{units.architecture.layers}." not in f".{path}":
            continue
        if isinstance(module, nn.Linear) or is_transposed(module):
            expected.add(f"{path}.weight")
            if module.bias is not None and not path.endswith(units.architecture.attention_out):
                expected.add(f"{path}.bias")
        if path.endswith("experts"):
            expected.add(f"{path}.down_proj")
    assert units.owned_parameters() == expected


def test_units_of_a_group_share_each_slice_evenly(case):
    """Every unit owns as many entries of a slice as the others, alone or with the heads that read the same key."""
    name, model, units = case
    parameters = dict(model.named_parameters())
    seen = set()
    for piece in units.slices:
        assert len(piece.owners) == parameters[piece.parameter].shape[piece.axis]
        counts = torch.bincount(piece.owners.flatten(), minlength=units.sizes[piece.group])
        assert len(counts) == units.sizes[piece.group] and counts.min() == counts.max() > 0
        if piece.group.endswith("head"):
            seen |= {tuple(sorted(set(row))) for row in piece.owners.tolist()}
        else:
            assert piece.owners.shape[1] == 1
    assert seen == {(head,) for head in range(HEADS)} | set(SHARING.get(name, []))


@pytest.mark.parametrize("kind", ["head", "intermediate", "output"])
def test_closed_gate_equals_zeroed_weights(case, kind):
    """Written out once more, in the last layer: zeros in the projection that reads the unit, or makes it."""
    name, model, units = case
    key, entry = f"layers.{LAYERS - 1}.{kind}", units.architecture
    if key not in units.groups:
        return
    gate = torch.ones(2, units.sizes[key])
    unit = 3
    gate[0, unit] = 0
    open_logits, gated_logits = logits(model), logits(model, units, {key: gate})
    layer = model.base_model.get_submodule(entry.layers)[-1]
    if kind == "output" and LAYERS - 1 in EXPERT_LAYERS.get(name, ()):
        (made,) = [p for path, p in layer.named_parameters() if path.endswith("experts.down_proj")]
        zeroed = [made.data[:, unit]]
    else:
        module = layer.get_submodule(entry.attention_out if kind == "head" else entry.ffn_out)
        weight = module.weight.data.T if is_transposed(module) else module.weight.data  # [out, in]
        if kind == "output":
            zeroed = [weight[unit]] + ([] if module.bias is None else [module.bias.data[unit : unit + 1]])
        else:
            width = weight.shape[1] // units.sizes[key]
            zeroed = [weight[:, unit * width : (unit + 1) * width]]
    kept = [view.clone() for view in zeroed]
    for view in zeroed:
        view.zero_()
    zeroed_logits = logits(model)
    for view, value in zip(zeroed, kept, strict=True):
        view.copy_(value)
    torch.testing.assert_close(gated_logits[0], zeroed_logits[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(gated_logits[1], open_logits[1])
    assert (open_logits - zeroed_logits)[0].abs().max() > 1e-3


def test_open_gates_change_no_bit_and_leave_no_hook(case):
    _, model, units = case
    before, hooks_before = logits(model), hooks(model)
    gates = ones(units.groups, 2, torch.device("cpu"))
    assert torch.equal(logits(model, units, gates), before)
    with pytest.raises(RuntimeError, match="on purpose"), gated(units, gates):
        assert len(hooks(model)) == len(hooks_before) + len(units.groups)
        raise RuntimeError("on purpose")
    assert hooks(model) == hooks_before


def test_sparse_head_equals_the_dense_loss(case):
    """The head on the predicted tokens alone gives the loss and the gradients of the head on all tokens."""
    _, model, units = case
    batch = random_batch([9, 7, 5])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    predicted = batch["labels"] != -100
    dense = F.cross_entropy(model(**inputs).logits[predicted], batch["labels"][predicted])
    dense_gradients = torch.autograd.grad(dense, list(model.parameters()), allow_unused=True)
    before = hooks(model)
    output = run_language_model(model, units, inputs, batch["labels"])
    assert hooks(model) == before
    assert output.logits.shape == (predicted.sum(), VOCABULARY)
    assert output.hidden.shape[:2] == (3, 9)
    sparse = output.losses().mean()
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)
    sparse_gradients = torch.autograd.grad(sparse, list(model.parameters()), allow_unused=True)
    for (parameter, _), ours, theirs in zip(model.named_parameters(), sparse_gradients, dense_gradients, strict=True):
        assert (ours is None) == (theirs is None), parameter
        if ours is not None:
            torch.testing.assert_close(
                ours, theirs, rtol=1e-3, atol=1e-5, msg=lambda text, p=parameter: f"{p}: {text}"
            )
    means = output.row_means(3)
    for row in range(3):
        torch.testing.assert_close(means[row], output.losses()[output.rows == row].mean())


@pytest.mark.parametrize("name", ["roberta", "distilbert", "modernbert", "deberta-v2"])
def test_dense_loss_is_the_models_own(name):
    model, _ = build(name)
    batch = random_batch([9, 7, 5])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    predicted = batch["labels"] != -100
    ours = F.cross_entropy(model(**inputs).logits[predicted], batch["labels"][predicted])
    torch.testing.assert_close(ours, model(**inputs, labels=batch["labels"]).loss)


# ---- layouts -------------------------------------------------------------------------------------------------------


def readers(layout, rows, heads=4, width=3):
    return [tuple(sorted(set(row))) for row in head_owners(layout, heads, width, rows, "here").tolist()]


def test_layout_with_grouped_queries():
    """Four query heads of width 3, then two key heads and two value heads, each read by two query heads."""
    queries = [(head,) for head in range(4) for _ in range(3)]
    shared = [pair for pair in ((0, 1), (2, 3)) for _ in range(3)]
    assert readers("head kv kv", 24) == queries + shared + shared


def test_layout_of_one_key_for_all_heads():
    assert readers("head kv kv", 18) == [(head,) for head in range(4) for _ in range(3)] + [(0, 1, 2, 3)] * 6
    assert readers("(head kv kv)", 18) == readers("head kv kv", 18)


def test_layout_in_brackets_stands_once_per_key_value_head():
    """Two query heads, their key, their value; the next two, their key, their value."""
    first = [(0,)] * 3 + [(1,)] * 3 + [(0, 1)] * 6
    second = [(2,)] * 3 + [(3,)] * 3 + [(2, 3)] * 6
    assert readers("(head kv kv)", 24) == first + second


def test_layout_in_brackets_with_a_key_per_head():
    assert readers("(head kv kv)", 36) == readers("head", 36) == readers("(head head head)", 36)


def test_key_value_rows_take_the_largest_importance_of_their_readers():
    piece = Slice("qkv.weight", 0, "layers.0.head", head_owners("head kv kv", 4, 2, 16, "here"))
    spread = piece.spread(torch.tensor([0.1, 0.7, 0.4, 0.2]), ndim=2)
    assert spread.shape == (16, 1)
    expected = [0.1, 0.1, 0.7, 0.7, 0.4, 0.4, 0.2, 0.2] + [0.7, 0.7, 0.4, 0.4] * 2
    torch.testing.assert_close(spread[:, 0], torch.tensor(expected))


def test_importance_of_output_neurons_lies_along_an_axis_of_the_fused_experts():
    spread = Slice("down_proj", 1, "layers.0.output", torch.arange(3)[:, None]).spread(torch.tensor([1, 2, 3]), 3)
    assert spread.shape == (1, 3, 1) and spread.flatten().tolist() == [1, 2, 3]


def test_layout_interleaved_by_head():
    """`head` on a fused projection: query, key and value of a head stand together."""
    assert readers("head", 24, width=2) == [(row // 6,) for row in range(24)]


def test_layout_in_blocks():
    assert readers("head head head", 24, width=2) == [(row // 2 % 4,) for row in range(24)]


def test_layout_of_fused_gate_and_up():
    assert _neuron_owners("neuron neuron", 3, 6, "here").tolist() == [[0], [1], [2]] * 2
    assert _neuron_owners("neuron", 3, 6, "here").tolist() == [[0], [0], [1], [1], [2], [2]]


@pytest.mark.parametrize("layout", ["", "()", "head value", "neuron", "(head kv) kv"])
def test_attention_layout_of_unknown_words(layout):
    with pytest.raises(UserError) as error:
        head_owners(layout, 4, 3, 24, "here")
    assert f"layout '{layout}' of here is not made of head and kv" in str(error.value)


@pytest.mark.parametrize("layout", ["", "neuron head"])
def test_neuron_layout_of_unknown_words(layout):
    with pytest.raises(UserError, match=f"layout '{layout}' of here is not made of neuron"):
        _neuron_owners(layout, 3, 24, "here")


@pytest.mark.parametrize(
    ("layout", "rows", "message"),
    [
        ("head head", 25, "has 25 rows, no multiple of the 8 units of its layout 'head head'"),
        ("head kv kv", 25, "leaves no number of key/value heads that they could share"),  # no whole features
        ("head kv kv", 30, "leaves no number of key/value heads that they could share"),  # three for four heads
        ("head kv kv", 12, "leaves no number of key/value heads that they could share"),  # none
    ],
)
def test_layout_that_does_not_fit_the_rows(layout, rows, message):
    with pytest.raises(UserError, match=f"here .*{message}"):
        head_owners(layout, 4, 3, rows, "here")


def test_rows_of_falcons_interleaved_groups():
    """Width 8: two queries, a key and a value take 32 rows, twice."""
    _, units = build("falcon, grouped")
    (piece,) = (
        piece for piece in units.slices if piece.parameter.endswith("h.0.self_attention.query_key_value.weight")
    )
    entries = [(piece.owners == head).any(dim=1).nonzero()[:, 0].tolist() for head in range(HEADS)]
    assert entries[0] == [*range(0, 8), *range(16, 32)] and entries[1] == list(range(8, 32))
    assert entries[2] == [*range(32, 40), *range(48, 64)] and entries[3] == list(range(40, 64))


def test_transposed_projection_lies_along_the_other_axis():
    """`Conv1D` keeps [in, out]: a neuron's rows are columns there, and the heads' columns are rows."""
    _, units = build("gpt2")
    axes = {piece.parameter.removeprefix("transformer.h.0."): piece.axis for piece in units.slices}
    assert axes["attn.c_attn.weight"] == 1 and axes["attn.c_attn.bias"] == 0
    assert axes["attn.c_proj.weight"] == 0 and "attn.c_proj.bias" not in axes
    assert axes["mlp.c_fc.weight"] == 1 and axes["mlp.c_fc.bias"] == 0
    assert axes["mlp.c_proj.weight"] == 1 and axes["mlp.c_proj.bias"] == 0


def test_kinds_that_a_layer_lacks():
    """Importance of a model with experts in one of two layers: normalised, saved, loaded and summed up."""
    _, units = build("qwen3_moe, one layer without experts")
    raw = {key: torch.rand(size) for key, size in units.sizes.items()}
    importance = Importance("rank")
    importance.accumulate("bio", raw)
    assert set(importance.saturation()) == {"head", "intermediate", "output"}
    layers = {kind: len(maps["bio"]) for kind, maps in importance.maps()["maps"].items()}
    assert layers == {"head": 2, "intermediate": 1, "output": 2}


# ---- entries -------------------------------------------------------------------------------------------------------


def test_unsupported_model_type_lists_the_supported_ones():
    config = AutoConfig.for_model("gptj", n_layer=1, n_embd=8, n_head=2, rotary_dim=2, vocab_size=VOCABULARY)
    with pytest.raises(UserError) as error:
        Units(AutoModelForCausalLM.from_config(config))
    for word in ("'gptj'", *ARCHITECTURES, "das-lm units MODEL", "architecture=", "units:"):
        assert word in str(error.value)


def roberta_entry(**changes):
    entry = ARCHITECTURES["roberta"]
    return Architecture(**{**{name: getattr(entry, name) for name in entry.__dataclass_fields__}, **changes})


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"layers": "encoder"}, "'encoder' is no list of layers but RobertaEncoder"),
        ({"layers": "encoder.layers"}, "'encoder.layers'.*RobertaModel.*Did you mean 'encoder.layer'"),
        ({"attention_out": "attention.output.proj"}, "'attention.output.proj', but RobertaLayer"),
        ({"ffn_in": {"intermediate.up": "neuron"}}, "'intermediate.up'"),
        ({"attention_in": {"attention.self.q": "head"}}, "'attention.self.q'"),
        ({"lm_head": ("cls", "other")}, r"RobertaForMaskedLM has no LM head \(cls or other\)"),
        ({"heads": "n_heads"}, "no number 'n_heads'"),
        (
            {"heads": "vocab_size"},
            "attention.output.dense of layer 0 has 32 input features, no multiple of the 64 heads",
        ),
        ({"ffn_in": {"intermediate.dense": "neuron neuron"}}, "intermediate.dense of layer 0 has 64 rows"),
        ({"ffn_in": {"intermediate.dense": "head"}}, "layout 'head' of intermediate.dense of layer 0"),
        ({"ffn_out": "output.LayerNorm"}, "'output.LayerNorm' is no projection: LayerNorm"),
        ({"ffn_out": None}, "layer 0 has no FFN; give ffn_in and ffn_out"),
        ({"shared_norms": ("attention.q_norm",)}, "'attention.q_norm'"),
        ({"moe_block": "mlp"}, "moe_block and moe_out go together"),
        ({"moe_block": "output", "moe_out": {"output.dense": 0}}, "'output.dense' of layer 0 is no parameter with an"),
        ({"moe_block": "output", "moe_out": {"output.dense.weight": 2}}, "no parameter with an axis 2"),
        (
            {"moe_block": "output", "moe_out": {"output.dense.weight": 1, "output.dense.bias": 0}},
            "different lengths in layer 0: {'output.dense.weight': 64, 'output.dense.bias': 32}",
        ),
        ({"moe_block": "mlp", "moe_out": {"output.dense.weight": 0}}, "names 'mlp'"),
    ],
)
def test_entry_that_does_not_fit_names_what_is_missing(changes, missing):
    with pytest.raises(UserError, match=missing):
        Units(tiny_roberta(), roberta_entry(**changes))


def test_model_without_lm_head():
    encoder = tiny_roberta().roberta
    with pytest.raises(UserError, match="RobertaModel has no LM head .* AutoModelForMaskedLM"):
        Units(encoder)


def test_entry_as_a_recipe_gives_it():
    """Plain data makes the same entry; a wrong key, a missing one, or one of a wrong type is named."""
    plain = {name: getattr(LLAMA, name) for name in ("layers", "attention_in", "attention_out", "ffn_in", "ffn_out")}
    assert Architecture.from_dict({**plain, "lm_head": "lm_head"}) == LLAMA
    with pytest.raises(UserError, match="unknown key 'layer'. Did you mean 'layers'"):
        Architecture.from_dict({**plain, "layer": "h"})
    with pytest.raises(UserError, match="units: lm_head: "):
        Architecture.from_dict(plain)
    with pytest.raises(UserError, match="units: attention_in: "):
        Architecture.from_dict({**plain, "lm_head": "lm_head", "attention_in": ["q_proj"]})


def test_optional_projection_that_is_there_is_owned():
    """Without shared keys, DeBERTa's position projections belong to the heads; with them there are none."""
    owned = {name: build(name)[1].owned_parameters() for name in ("deberta-v2", "deberta-v2, shared keys")}
    difference = owned["deberta-v2"] - owned["deberta-v2, shared keys"]
    assert {name.split("self.")[1] for name in difference} == {
        "pos_key_proj.weight",
        "pos_key_proj.bias",
        "pos_query_proj.weight",
        "pos_query_proj.bias",
    }


def test_user_entry_for_a_module_of_ones_own():
    """Nothing but `config.model_type`, `base_model` and the named modules is asked of a model."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.up, self.down = (
                nn.Linear(6, 12),
                nn.Linear(6, 6),
                nn.Linear(6, 5),
                nn.Linear(5, 6),
            )

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(model_type="mine", n=3)
            self.layers, self.out = nn.ModuleList([Layer()]), nn.Linear(6, 9)

        @property
        def base_model(self):
            return self

    entry = Architecture("layers", {"qkv": "head head"}, "proj", {"up": "neuron"}, "down", "out", heads="n")
    model = Model()
    units = Units(model, entry)
    assert units.sizes == {"layers.0.head": 3, "layers.0.intermediate": 5, "layers.0.output": 6}
    assert units.lm_head is model.out
