"""Where the models of each architecture keep their heads and neurons: a table, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from das_lm.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Architecture:
    """
    Where the models of one `config.model_type` keep their units: one entry of [`ARCHITECTURES`], or a user's own.

    A projection maps to its *layout*: what the rows of its weight (its output features) are, as words in the order in
    which they stand: `"head"` (all heads, one after the other), `"kv"` (all key/value heads; each is read by
    `heads / kv` query heads), `"neuron"`. Rows are shared out evenly: `"head head head"` is a fused query-key-value
    projection in three blocks, `"head kv kv"` the same with grouped queries, `"head"` on a projection with three times
    as many rows one that interleaves them per head, `"neuron neuron"` a fused gate and up projection. In brackets the
    words stand once per key/value head: `"(head kv kv)"` is the query heads that read it, its key, its value, then
    those of the next. How many key/value heads there are follows from the rows. Transposed weights (`Conv1D`) are
    recognised by their class.

    A mixture of experts has no intermediate neurons here: their weights are fused over the experts, and what a token
    meets depends on its routing. Its heads are units, and so are its output neurons, each with its rows in every
    expert.

    Args:
        layers: path of the list of layers inside the base model.
        attention_in: path inside a layer -> layout, of the query, key, value (and position) projections.
        attention_out: path inside a layer of the attention output projection, whose input features are the heads'.
        ffn_in: path inside a layer -> layout, of the up (and gate) projections.
        ffn_out: path inside a layer of the FFN output projection: its inputs are the intermediate neurons, its outputs
            the output neurons. `None` if all layers have a mixture of experts instead.
        lm_head: path inside the model of the first module of the LM head; several where it differs by configuration.
        optional: paths of `attention_in` and `ffn_in` that a configuration may leave out.
        shared_norms: paths inside a layer of the norms of queries or keys that run over all heads at once: a head's
            rows move the other heads through the norm's denominator, which no mask can keep apart.
        moe_block: path inside a layer of the mixture of experts that stands in the place of the FFN, in the layers
            that have one; its output features are the output neurons.
        moe_out: path inside a layer of each parameter (not module) that makes the output neurons of `moe_block` -> the
            axis that they lie along.
        heads: name of the number of heads in the model's config.
    """

    layers: str
    attention_in: Mapping[str, str]
    attention_out: str
    ffn_in: Mapping[str, str]
    ffn_out: str | None
    lm_head: str | tuple[str, ...]
    optional: tuple[str, ...] = ()
    shared_norms: tuple[str, ...] = ()
    moe_block: str | None = None
    moe_out: Mapping[str, int] = field(default_factory=dict)
    heads: str = "num_attention_heads"

    def __post_init__(self):
        if bool(self.moe_block) != bool(self.moe_out):
            raise UserError(
                "units: moe_block and moe_out go together: the module, and the parameters that make its output"
            )

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Architecture:
        """Build an entry from plain data, as a recipe's `units` has it. Raises `UserError` on wrong keys or values."""
        from pydantic import TypeAdapter, ValidationError

        names = [f.name for f in fields(cls)]
        for key in entry:
            if key not in names:
                raise UserError(f"units: unknown key '{key}'.{did_you_mean(key, names)}")
        try:
            return TypeAdapter(cls).validate_python(dict(entry))
        except ValidationError as error:
            problems = {str(item["loc"][0]): item["msg"] for item in reversed(error.errors())}  # the first of each key
            raise UserError("\n".join(f"units: {key}: {problem}" for key, problem in problems.items())) from None


_BERT = Architecture(
    layers="encoder.layer",
    attention_in={
        "attention.self.query": "head",
        "attention.self.key": "head",
        "attention.self.value": "head",
    },
    attention_out="attention.output.dense",
    ffn_in={"intermediate.dense": "neuron"},
    ffn_out="output.dense",
    lm_head="cls",
)
_DEBERTA = {
    "attention.self.query_proj": "head",
    "attention.self.key_proj": "head",
    "attention.self.value_proj": "head",
}
_DEBERTA_POSITIONS = {"attention.self.pos_key_proj": "head", "attention.self.pos_query_proj": "head"}
_LLAMA = Architecture(
    layers="layers",
    attention_in={"self_attn.q_proj": "head", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"},
    attention_out="self_attn.o_proj",
    ffn_in={"mlp.gate_proj": "neuron", "mlp.up_proj": "neuron"},
    ffn_out="mlp.down_proj",
    lm_head="lm_head",
)
_LLAMA_EXPERTS = replace(_LLAMA, moe_block="mlp", moe_out={"mlp.experts.down_proj": 1})  # [experts, output, neurons]

#: `config.model_type` -> where its units are.
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": replace(_BERT, lm_head="lm_head"),
    "xlm-roberta": replace(_BERT, lm_head="lm_head"),
    "electra": replace(_BERT, lm_head="generator_predictions"),
    "distilbert": Architecture(
        layers="transformer.layer",
        attention_in={"attention.q_lin": "head", "attention.k_lin": "head", "attention.v_lin": "head"},
        attention_out="attention.out_lin",
        ffn_in={"ffn.lin1": "neuron"},
        ffn_out="ffn.lin2",
        lm_head="vocab_transform",
    ),
    "deberta-v2": replace(
        _BERT,
        attention_in={**_DEBERTA, **_DEBERTA_POSITIONS},
        optional=tuple(_DEBERTA_POSITIONS),
        lm_head=("cls", "lm_predictions"),
    ),
    "modernbert": Architecture(
        layers="layers",
        attention_in={"attn.Wqkv": "head head head"},
        attention_out="attn.Wo",
        ffn_in={"mlp.Wi": "neuron neuron"},
        ffn_out="mlp.Wo",
        lm_head="head",
    ),
    "gpt2": Architecture(
        layers="h",
        attention_in={"attn.c_attn": "head head head"},
        attention_out="attn.c_proj",
        ffn_in={"mlp.c_fc": "neuron"},
        ffn_out="mlp.c_proj",
        lm_head="lm_head",
    ),
    "gpt_neox": Architecture(
        layers="layers",
        attention_in={"attention.query_key_value": "head"},
        attention_out="attention.dense",
        ffn_in={"mlp.dense_h_to_4h": "neuron"},
        ffn_out="mlp.dense_4h_to_h",
        lm_head="lm_head",
    ),
    "opt": Architecture(
        layers="decoder.layers",
        attention_in={"self_attn.q_proj": "head", "self_attn.k_proj": "head", "self_attn.v_proj": "head"},
        attention_out="self_attn.out_proj",
        ffn_in={"fc1": "neuron"},
        ffn_out="fc2",
        lm_head="lm_head",
    ),
    "falcon": Architecture(
        layers="h",
        attention_in={"self_attention.query_key_value": "(head kv kv)"},
        attention_out="self_attention.dense",
        ffn_in={"mlp.dense_h_to_4h": "neuron"},
        ffn_out="mlp.dense_4h_to_h",
        lm_head="lm_head",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "olmo2": replace(_LLAMA, shared_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "phi3": replace(
        _LLAMA,
        attention_in={"self_attn.qkv_proj": "head kv kv"},
        ffn_in={"mlp.gate_up_proj": "neuron neuron"},
    ),
    "mixtral": _LLAMA_EXPERTS,
    "qwen3_moe": _LLAMA_EXPERTS,
}
