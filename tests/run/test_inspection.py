"""`das-lm units`: the contract finds what is broken, the map says what is there, a proposal is an entry that holds."""

import copy
import io
import re
from dataclasses import replace

import pytest
import torch
import yaml
from rich.console import Console
from transformers import (
    BloomConfig,
    GPTBigCodeConfig,
    MambaConfig,
    MptConfig,
    OlmoeConfig,
    PhiConfig,
    Qwen2MoeConfig,
    T5Config,
)

from das_lm.cli import main
from das_lm.errors import UserError
from das_lm.run.inspection import build_model, inspect, load_entry, reduced
from das_lm.units import ARCHITECTURES, Architecture, Units, contract
from das_lm.units.contract import PROPERTIES, check_contract, randomize
from tests.units.test_architectures import CONFIGS, EXPERTS, GROUPED, build

LLAMA, GPT2 = ARCHITECTURES["llama"], ARCHITECTURES["gpt2"]
QWEN2_MOE = Qwen2MoeConfig(
    **{**EXPERTS, "num_experts": 4}, moe_intermediate_size=16, shared_expert_intermediate_size=24
)


# ---- the contract finds what is broken ---------------------------------------------------------------------------


def without(entry, field, path):
    return replace(entry, **{field: {key: value for key, value in getattr(entry, field).items() if key != path}})


BROKEN = {
    "fused projection, in blocks and not by head": (
        "gpt2",
        replace(GPT2, attention_in={"attn.c_attn": "head"}),
        ("rows", "h.0.attn.c_attn.weight: what belongs to head 0 changes head 1, 2"),
    ),
    "fused projection, by head and not in blocks": (
        "gpt_neox",
        replace(ARCHITECTURES["gpt_neox"], attention_in={"attention.query_key_value": "head head head"}),
        ("rows", "what belongs to head 0 changes head 1, 2"),
    ),
    "grouped queries, one group after the other": (
        "falcon, grouped",
        replace(ARCHITECTURES["falcon"], attention_in={"self_attention.query_key_value": "head kv kv"}),
        ("rows", "query_key_value.weight: what belongs to head"),
    ),
    "grouped queries, not one group after the other": (
        "phi3",
        replace(ARCHITECTURES["phi3"], attention_in={"self_attn.qkv_proj": "(head kv kv)"}),
        ("rows", "qkv_proj.weight: what belongs to head"),
    ),
    "gate and up, neuron by neuron": (
        "modernbert",
        replace(ARCHITECTURES["modernbert"], ffn_in={"mlp.Wi": "neuron"}),
        ("rows", "mlp.Wi.weight: what belongs to intermediate 0 changes intermediate 1"),
    ),
    "no gate projection": (
        "llama",
        without(LLAMA, "ffn_in", "mlp.gate_proj"),
        ("complete", "model.layers.0.mlp.gate_proj.weight belongs to no intermediate"),
    ),
    "no value projection": (
        "llama",
        without(LLAMA, "attention_in", "self_attn.v_proj"),
        ("complete", "model.layers.1.self_attn.v_proj.weight belongs to no head"),
    ),
    "no projection of positions": (
        "deberta-v2",
        without(ARCHITECTURES["deberta-v2"], "attention_in", "attention.self.pos_key_proj"),
        ("complete", "pos_key_proj.weight belongs to no head"),
    ),
    "output for input": (
        "llama",
        replace(LLAMA, ffn_in={"mlp.gate_proj": "neuron", "mlp.down_proj": "neuron"}, ffn_out="mlp.up_proj"),
        ("rows", "mlp.gate_proj.weight: what belongs to intermediate 0 does not change intermediate 0"),
    ),
    "a norm over all heads that is not named": (
        "olmo2",
        replace(ARCHITECTURES["olmo2"], shared_norms=("self_attn.q_norm",)),
        ("rows", "k_proj.weight: what belongs to head 0 changes head 2, 3"),
    ),
    "a norm of each head that is named": (
        "qwen3",
        replace(LLAMA, shared_norms=("self_attn.q_norm",)),
        ("rows", "self_attn.q_norm of layer 1 is in shared_norms, but no head moves another through it"),
    ),
    "the other axis of the experts' weights": (
        "mixtral",
        replace(ARCHITECTURES["mixtral"], moe_out={"mlp.experts.gate_up_proj": 2}),
        ("rows", "gate_up_proj: what belongs to output 0 changes output"),
    ),
    "no shared expert": (
        "qwen2_moe",
        ARCHITECTURES["qwen3_moe"],
        ("complete", "shared_expert.down_proj.weight makes output neurons along axis 0, and belongs to none"),
    ),
    "an LM head before the last hidden state": (
        "bert",
        replace(ARCHITECTURES["bert"], lm_head="bert.embeddings.word_embeddings"),
        ("lm_head", "bert.embeddings.word_embeddings"),
    ),
    "an LM head inside a layer": (
        "llama",
        replace(LLAMA, lm_head="model.layers.1.mlp"),
        ("lm_head", "model.layers.1.mlp cannot run on [positions, features]: "),
    ),
    "an LM head that does not run": (
        "opt",  # whose model calls its decoder, and not the module around it
        replace(ARCHITECTURES["opt"], lm_head="model"),
        ("lm_head", "model does not run once on the last hidden state"),
    ),
    "an LM head that needs all positions": (
        "bert",
        replace(ARCHITECTURES["bert"], lm_head="bert.encoder.layer.0"),
        ("lm_head", "bert.encoder.layer.0 gives chosen positions other logits"),
    ),
}


def model_of(name):
    if name in CONFIGS:
        return build(name)[0]
    model = build_model(copy.deepcopy(QWEN2_MOE)).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("what", BROKEN)
def test_broken_entry_is_found(what):
    name, entry, (broken, message) = BROKEN[what]
    problems = check_contract(Units(model_of(name), entry))
    assert list(problems) == list(PROPERTIES)
    assert any(message in problem for problem in problems[broken]), problems
    assert not problems["mask"] and not problems["checkpoint"]


def change_owners(units, end, change):
    """Exchange one slice, that of the parameter whose name ends so."""
    (index,) = (i for i, piece in enumerate(units.slices) if piece.parameter.endswith(end))
    units.slices[index] = change(units.slices[index])


@pytest.mark.parametrize(
    ("name", "parameter", "change", "message"),
    [
        ("gpt2", "h.0.attn.c_proj.weight", lambda piece: replace(piece, axis=1), "reaches the logits past its gate"),
        (
            "llama",  # keys of heads 0 and 2, 1 and 3, in the place of 0 and 1, 2 and 3
            "layers.0.self_attn.k_proj.weight",
            lambda piece: replace(piece, owners=torch.tensor([[0, 2], [1, 3]]).repeat_interleave(8, dim=0)),
            "what belongs to head 0 changes head 1",
        ),
        (
            "opt",
            "layers.1.fc2.bias",
            lambda piece: replace(piece, owners=piece.owners.flip(0)),
            "fc2.bias: what belongs to output 0 changes output 31",
        ),
        (
            "llama, biases, a key per head",
            "layers.1.self_attn.v_proj.bias",
            lambda piece: replace(piece, owners=piece.owners.clamp(min=1)),
            "v_proj.bias: head 0 has no part in it",
        ),
    ],
)
def test_broken_slice_is_found(name, parameter, change, message):
    _, units = build(name)
    change_owners(units, parameter, change)
    assert any(message in problem for problem in check_contract(units)["rows"])


def test_broken_gate_is_found(monkeypatch):
    """Gates that forget which row they belong to, and gates that do nothing."""
    _, units = build("roberta")

    def of_all_rows(units, gates):
        return right(units, {key: gate.amin(dim=0, keepdim=True).expand_as(gate) for key, gate in gates.items()})

    right = contract.gated
    monkeypatch.setattr(contract, "gated", of_all_rows)
    assert any("is felt in another" in problem for problem in check_contract(units)["gate"])
    monkeypatch.setattr(contract, "gated", lambda units, gates: right(units, {}))
    assert any("closed is not its weights at 0" in problem for problem in check_contract(units)["gate"])


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_broken_mask_is_found(monkeypatch, strength):
    _, units = build("roberta")
    weak = contract.SoftMask
    monkeypatch.setattr(contract, "SoftMask", lambda units, importance: weak(units, importance, strength=strength))
    problems = check_contract(units)["mask"]
    assert len(problems) == len(units.owned_parameters()) and all("importance 1 leaves" in p for p in problems)


def test_broken_checkpoint_is_found(monkeypatch):
    model, units = build("gpt2")
    save = model.save_pretrained

    def without_a_norm(directory):
        save(directory, state_dict={k: v for k, v in model.state_dict().items() if "h.1.ln_2.bias" not in k})

    monkeypatch.setattr(model, "save_pretrained", without_a_norm)
    assert any("h.1.ln_2.bias" in problem for problem in check_contract(units)["checkpoint"])


def test_block_that_returns_no_tensor():
    """A gate would fall on a tuple: said, not crashed into."""
    model, units = build("bert")
    model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda module, args, output: (output, None))
    with pytest.raises(UserError, match="the output of Linear, where layers.0.output would be gated, is no tensor"):
        check_contract(units)


# ---- the map -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """Directory with the config alone of a model."""

    def save(config):
        config = copy.deepcopy(config)
        config.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def printed(inspection):
    console = Console(width=160, record=True, file=io.StringIO())
    inspection.print(console)
    return re.sub(r"[│┃]", "|", console.export_text())


def row(*cells):
    return re.compile(r"\|\s*" + r"\s*\|\s*".join(map(re.escape, cells)) + r"\s*\|")


def test_map_of_a_fused_projection_with_grouped_queries(saved):
    text = printed(inspect(saved(CONFIGS["phi3"])))
    assert "phi3, in the table: Phi3ForCausalLM, 2 layers" in text and "Layers 0–1" in text
    assert row("heads", "4", "the input of self_attn.o_proj").search(text)
    assert row("intermediate neurons", "64", "the input of mlp.down_proj").search(text)
    assert row("output neurons", "32", "the output of mlp.down_proj").search(text)
    owners = "head 0: 0–7; heads 0–1 share 32–39, 48–55"
    assert row("self_attn.qkv_proj.weight", "64 × 32", "0", owners).search(text)
    assert row("self_attn.o_proj.weight", "32 × 32", "1", "head 0: 0–7").search(text)
    assert row("mlp.gate_up_proj.weight", "128 × 32", "0", "neuron 0: 0, 64").search(text)
    layer = 64 * 32 + 32 * 32 + 128 * 32 + 32 * 64
    others = 2 * 64 * 32 + 5 * 32
    assert f"{2 * layer:,} of {2 * layer + others:,} parameters belong to units" in text
    assert "2,048  model.embed_tokens.weight" in text and "64  model.layers.*.input_layernorm.weight" in text
    assert text.count("✓") == len(PROPERTIES) and "✗" not in text


def test_map_of_layers_with_and_without_experts(saved):
    text = printed(inspect(saved(CONFIGS["qwen3_moe, one layer without experts"])))
    first, second = text.split("Layer 1 ", 1)
    assert "Layer 0 " in first and "intermediate neurons" in first
    assert "intermediate neurons" not in second
    assert row("mlp.experts.down_proj", "4 × 32 × 16", "1", "neuron 0: 0").search(second)
    assert "Layer 1: a mixture of experts" in second and "not covered" in second


def test_map_names_what_heads_share(saved):
    assert "self_attn.q_norm and self_attn.k_norm run over all heads" in printed(inspect(saved(CONFIGS["olmo2"])))


def test_no_weights_are_made_for_the_map():
    """A model type alone is enough, at its full size."""
    inspection = inspect("gpt2")
    assert next(inspection.units.model.parameters()).device.type == "meta"
    assert inspection.units.sizes["layers.11.intermediate"] == 3072
    assert (inspection.source, inspection.holds, inspection.checked_layers) == ("table", True, 2)


def test_copy_for_the_contract_has_every_kind_of_layer(saved):
    config = copy.deepcopy(CONFIGS["qwen3_moe, one layer without experts"])
    config.num_hidden_layers, config.mlp_only_layers = 7, [0, 1, 2]
    inspection = inspect(saved(config))
    assert len(inspection.units.layers) == 7 and inspection.checked_layers == 4 and inspection.holds


def test_reduced_config():
    config = copy.deepcopy(CONFIGS["gemma3_text"])
    config.num_hidden_layers, config.layer_types = 6, ["sliding_attention"] * 5 + ["full_attention"]
    config.vocab_size, config.intermediate_size, config.pad_token_id, config.eos_token_id = 9999, 500, 3, [800, 1]
    small = reduced(config, 3)
    assert (small.num_hidden_layers, small.layer_types) == (3, ["sliding_attention"] * 3)
    assert (small.vocab_size, small.intermediate_size, small.hidden_size, small.head_dim) == (256, 64, 32, 16)
    assert (small.pad_token_id, small.eos_token_id) == (3, 0)
    assert config.num_hidden_layers == 6 and len(config.layer_types) == 6


# ---- proposals ---------------------------------------------------------------------------------------------------

UNKNOWN = {
    "bloom, interleaved": (
        BloomConfig(vocab_size=64, hidden_size=32, n_head=4, n_layer=2),
        {
            "attention_in": {"self_attention.query_key_value": "head"},
            "attention_out": "self_attention.dense",
            "ffn_in": {"mlp.dense_h_to_4h": "neuron"},
            "ffn_out": "mlp.dense_4h_to_h",
        },
    ),
    "gpt_bigcode, one key for all heads, and transposed": (
        GPTBigCodeConfig(vocab_size=64, n_embd=32, n_head=4, n_layer=2, n_positions=40),
        {"attention_in": {"attn.c_attn": "head kv kv"}, "attention_out": "attn.c_proj", "ffn_out": "mlp.c_proj"},
    ),
    "mpt, in blocks": (
        MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=2),
        {"layers": "blocks", "attention_in": {"attn.Wqkv": "head head head"}, "ffn_out": "ffn.down_proj"},
    ),
    "phi, grouped": (
        PhiConfig(**GROUPED),
        {
            "attention_in": {"self_attn.q_proj": "head", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"},
            "attention_out": "self_attn.dense",
            "ffn_in": {"mlp.fc1": "neuron"},
        },
    ),
    "olmoe, experts, norms over all heads": (
        OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
        {
            "shared_norms": ("self_attn.q_norm", "self_attn.k_norm"),
            "ffn_out": None,
            "moe_block": "mlp",
            "moe_out": {"mlp.experts.down_proj": 1},
        },
    ),
    "qwen2_moe, a shared expert": (
        QWEN2_MOE,
        {"moe_out": {"mlp.experts.down_proj": 1, "mlp.shared_expert.down_proj.weight": 0}},
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_proposed_entry(name, saved, capsys, tmp_path):
    """It is the right one, it is printed as a recipe takes it, and read back it is the same and holds."""
    config, expected = UNKNOWN[name]
    directory = saved(config)
    inspection = inspect(directory)
    entry = inspection.units.architecture
    assert inspection.source == "proposed" and inspection.holds
    assert {key: getattr(entry, key) for key in expected} == expected
    text = printed(inspection)
    proposal = text[text.index("units:") : text.index("Layers 0–1")]
    (tmp_path / "entry.yaml").write_text(proposal)
    assert Architecture.from_dict(yaml.safe_load(proposal)["units"]) == entry == load_entry(tmp_path / "entry.yaml")
    if name.startswith("bloom"):
        assert main(["units", directory, "--entry", str(tmp_path / "entry.yaml")]) == 0
        assert "bloom, with the entry given: BloomForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "modernbert", "distilbert", "olmo2", "opt"])
def test_proposal_for_a_known_model_is_what_the_table_says(name, saved, monkeypatch):
    model, units = build(name)
    known = [(piece.parameter, piece.axis, piece.group, piece.owners.tolist()) for piece in units.slices]
    directory = saved(CONFIGS[name])
    monkeypatch.delitem(ARCHITECTURES, name)
    inspection = inspect(directory)
    found = [(piece.parameter, piece.axis, piece.group, piece.owners.tolist()) for piece in inspection.units.slices]
    assert inspection.source == "proposed" and sorted(found) == sorted(known)


# ---- the command -------------------------------------------------------------------------------------------------


def test_command_prints_the_map(saved, capsys):
    assert main(["units", saved(CONFIGS["llama"])]) == 0
    out, err = capsys.readouterr()
    assert "llama, in the table: LlamaForCausalLM, 2 layers" in out and out.count("✓") == len(PROPERTIES)
    assert err == ""


def test_command_with_a_broken_entry(saved, capsys, tmp_path):
    """What is broken is printed, one message ends it, and the status is 2."""
    entry = tmp_path / "mine.yaml"
    plain = {key: getattr(GPT2, key) for key in ("layers", "attention_out", "ffn_in", "ffn_out", "lm_head")}
    entry.write_text(
        yaml.safe_dump({"description": "mine", "units": {**plain, "attention_in": {"attn.c_attn": "head"}}})
    )
    assert main(["units", saved(CONFIGS["gpt2"]), "--entry", str(entry)]) == 2
    out, err = capsys.readouterr()
    assert "✗ a unit's rows change that unit" in out and "what belongs to head 0 changes head 1, 2" in out
    assert err.startswith("das-lm: error: the contract does not hold") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
            "model type 'mamba' has none of num_attention",
        ),
        (T5Config(vocab_size=64, d_model=32, num_layers=2), "model type 't5' has no masked and no causal"),
    ],
)
def test_model_that_cannot_be_covered(config, message, saved, capsys):
    assert main(["units", saved(config)]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


def test_model_for_which_no_entry_holds(saved, capsys, monkeypatch):
    """The message says what the layers hold, and what to do."""
    monkeypatch.delitem(ARCHITECTURES, "roberta")
    monkeypatch.setattr("das_lm.units.proposal.find_problems", lambda units: iter([("rows", "broken")]))
    assert main(["units", saved(CONFIGS["roberta"])]) == 2
    err = capsys.readouterr().err
    assert "no entry was found for model type 'roberta'" in err and "--entry FILE.yaml" in err
    assert "attention.self.query [32, 32]" in err and "intermediate.dense [64, 32]" in err


BAD = [
    (["units"], "the following arguments are required: MODEL"),
    (["units", "lama"], "'lama' is no model type, no directory with a config.json, and no model of the hub"),
    (["units", "lama"], "Did you mean 'llama'?"),
    (["units", "gpt2", "--entry", "none.yaml"], "none.yaml: cannot be read: No such file"),
    (["units", "gpt2", "--entry", "list.yaml"], "list.yaml: expected a mapping of keys"),
    (["units", "gpt2", "--entry", "broken.yaml"], "broken YAML: "),
    (["units", "gpt2", "--entry", "key.yaml"], "units: unknown key 'layer'. Did you mean 'layers'?"),
    (["units", "gpt2", "--entry", "paths.yaml"], "names 'blocks', but GPT2Model has no such module"),
    (["units", "gpt2", "--entri", "x"], "unknown option '--entri'. Did you mean '--entry'?"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("- layers")
    (tmp_path / "broken.yaml").write_text("layers: [")
    (tmp_path / "key.yaml").write_text("layer: h")
    paths = {key: getattr(GPT2, key) for key in ("attention_in", "attention_out", "ffn_in", "ffn_out", "lm_head")}
    (tmp_path / "paths.yaml").write_text(yaml.safe_dump({**paths, "layers": "blocks"}))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
