"""Tiny causal models."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from das_lm.data.masking import labeling
from tests.helpers import BOS, EOS, PAD, VOCABULARY, build_tokenizer, random_blocks

SHAPE = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def tiny_gpt2(seed: int = 0, dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**SHAPE, **shape, **rates)).train()


LLAMA_SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 40, "initializer_range": 0.2,
}  # fmt: skip


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **LLAMA_SHAPE)).train()


TOKENIZER = build_tokenizer()

ADAPTED_METHODS = [
    "agem",
    "anchor",
    "das",
    "ema",
    "gate",
    "gem",
    "interpolate",
    "joint",
    "lwf",
    "naive",
    "replay",
    "self_replay",
]


def weights_of(model) -> dict[str, torch.Tensor]:
    """Parameters by the names that they have in a plain model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }


def batch_of(model) -> dict[str, torch.Tensor]:
    masking = labeling(TOKENIZER, model.can_generate(), 0.3)
    pairs = [masking(torch.tensor(row["input_ids"]).numpy(), seed) for seed, row in enumerate(random_blocks(6))]
    ids, labels = (torch.stack([torch.as_tensor(pair[index]) for pair in pairs]) for index in (0, 1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}")


#: Projections whose rows are units', as a regular expression: `c_proj` and `dense` are names of others too.
ROWS = {
    "roberta": r".*encoder.*(query|key|value|intermediate\.dense|layer\.\d+\.output\.dense)",
    "gpt2": r".*(c_attn|c_fc|mlp\.c_proj)",
    "llama": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
}
