"""Causal language models through the same trainer, walk, methods and measures."""

import json
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from das_lm import ContinualTrainer, DASConfig
from das_lm.cli import main
from das_lm.data.blocks import TrainingBlocks
from das_lm.data.masking import IGNORED, NextTokens
from das_lm.errors import UserError
from das_lm.measure.results import Results
from das_lm.methods import METHODS
from das_lm.methods.writing import Writer
from tests.helpers import BOS, EOS, PAD, VOCABULARY, build_tokenizer, random_blocks, tiny_roberta, write_texts
from tests.model.helpers import LLAMA_SHAPE, SHAPE, tiny_gpt2, tiny_llama


def tiny_qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, **LLAMA_SHAPE)).train()


def arguments(directory: Path, **options) -> DASConfig:
    common = {"max_steps": 4, "per_device_train_batch_size": 4, "max_length": 12, "learning_rate": 1e-3}
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "save_strategy": "no", "importance_samples": 8}
    return DASConfig(str(directory), **{**common, **quiet, **options})


def test_labels_are_the_tokens_that_follow():
    ids, labels = NextTokens()(np.array([BOS, 7, 8, 9, EOS]), seed=0)
    assert ids.tolist() == [BOS, 7, 8, 9, EOS] and labels.tolist() == [7, 8, 9, EOS, IGNORED]
    assert NextTokens().predicted(labels).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_the_loss_is_that_of_transformers(build, tmp_path):
    """One batch, padded: the sum over its predictions, divided by their number, as the model's own loss is."""
    model = build()
    trainer = ContinualTrainer(
        model, arguments(tmp_path), "naive", random_blocks(8), processing_class=build_tokenizer()
    )
    rows = [trainer.train_dataset[index] for index in range(4)]
    rows[0] = {**rows[0], **{name: rows[0][name][:6] for name in ("input_ids", "labels")}}
    batch = trainer.data_collator(rows)
    count = (batch["labels"] != IGNORED).sum()
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    theirs = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    theirs[0, 6:] = IGNORED
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, :-1]
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED))
    whole = trainer.data_collator(rows[1:])
    expected = model(**{k: whole[k] for k in ("input_ids", "attention_mask")}, labels=whole["input_ids"]).loss
    count = (whole["labels"] != IGNORED).sum()
    torch.testing.assert_close(trainer.compute_loss(model, dict(whole), num_items_in_batch=count), expected)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, tiny_qwen2])
def test_training_is_a_plain_loop(build, accumulation, tmp_path):
    """Blocks of different lengths: every predicted token of a step counts alike, in the log and in the gradient."""
    ids = random_blocks(24)["input_ids"]
    blocks = Dataset.from_dict({"input_ids": [one[: 4 + index % 9] for index, one in enumerate(ids)]})
    options = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    options |= {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    model, plain = build(), build()
    args = arguments(tmp_path, **options, logging_steps=1)
    trainer = ContinualTrainer(model, args, "naive", blocks, processing_class=build_tokenizer())
    rows = [trainer.train_dataset[index]["input_ids"] for index in range(16)]
    trainer.train()
    losses = []
    for step in range(4):
        of_rows = []
        for ids in rows[4 * step : 4 * step + 4]:
            logits = plain(torch.as_tensor(ids)[None]).logits[0, :-1]
            of_rows.append(F.cross_entropy(logits, torch.as_tensor(ids)[1:], reduction="sum"))
        loss = sum(of_rows) / sum(len(ids) - 1 for ids in rows[4 * step : 4 * step + 4])
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in history] == pytest.approx(losses, rel=1e-4)
    assert [entry["loss_clm"] for entry in history] == pytest.approx(losses, rel=1e-4)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_transformers_does_not_warn_of_padding_on_the_right(tmp_path, monkeypatch):
    ContinualTrainer(tiny_gpt2(), arguments(tmp_path), processing_class=build_tokenizer())
    logger, heard = logging.getLogger("transformers.modeling_utils"), []
    monkeypatch.setattr(logger, "callHandlers", lambda record: heard.append(record.getMessage()))
    monkeypatch.setattr(logger, "warning_once", logger.warning)  # that it came before is no reason here
    tiny_gpt2().warn_if_padding_and_no_attention_mask(torch.tensor([[7, PAD]]), attention_mask=None)
    logger.warning("another one")
    assert heard == ["another one"]


def test_held_out_text_by_document_token_and_byte(tmp_path):
    """Against a loop over documents: nats, perplexity, bits per byte of what is predicted."""
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(50)}" for _ in range(draw.randint(3, 25))) for _ in range(9)]
    model, tokenizer = tiny_llama(), build_tokenizer()
    trainer = ContinualTrainer(
        model, arguments(tmp_path), eval_dataset={"bio": Dataset.from_dict({"text": texts})},
        processing_class=tokenizer,
    )  # fmt: skip
    metrics = trainer.evaluate()
    nats, tokens, size = 0.0, 0, 0
    for text in texts:
        words = text.split()
        for start in range(0, len(words), 10):
            piece = words[start : start + 10]
            ids = torch.tensor([[BOS, *tokenizer(" ".join(piece), add_special_tokens=False)["input_ids"], EOS]])
            with torch.no_grad():
                log_probs = model.eval()(ids).logits[0, :-1].log_softmax(-1)
            nats -= log_probs.gather(1, ids[0, 1:, None]).sum().item()
            tokens += ids.shape[1] - 1
        size += len(text.encode())
    assert metrics["eval_bio_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["eval_bio_perplexity"] == pytest.approx(np.exp(nats / tokens), rel=1e-5)
    assert metrics["eval_bio_bytes"] == size
    assert metrics["eval_bio_bits_per_byte"] == pytest.approx(nats / size / np.log(2), rel=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_documents_of_a_block_do_not_see_each_other(build, attention, tmp_path):
    """A block of three documents predicts what each predicts by itself; without separation it does not."""
    model, tokenizer = build().eval(), build_tokenizer()
    model.set_attn_implementation(attention)
    documents = [[11, 12, 13, EOS], [21, 22, EOS], [31, 32, 33, 34]]
    block = torch.tensor([sum(documents, []), [*documents[2], EOS, *documents[1], PAD, PAD, PAD]])
    batch = {"input_ids": block, "attention_mask": (block != PAD).long()}
    batch["labels"] = F.pad(block[:, 1:], (0, 1), value=IGNORED).masked_fill(batch["attention_mask"] == 0, IGNORED)
    logits = {}
    for separate in (True, False):
        args = arguments(tmp_path, separate_documents=separate)
        trainer = ContinualTrainer(model, args, "naive", random_blocks(4), processing_class=tokenizer)
        output = trainer.criterion(model.eval(), batch)
        logits[separate] = [output.logits[output.rows == row] for row in (0, 1)]
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([document])).logits[0] for document in documents])
    torch.testing.assert_close(logits[True][0], alone[:-1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits[True][1][:4], alone[7:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits[False][0][4:7], alone[4:7], atol=1e-3)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("prior_gradient", [True, False])
def test_das_on_a_model_without_dropout(build, prior_gradient, tmp_path):
    """Proxy and views come from drops through the gates; masks hold; the importance is that of the drops' seed."""
    model = build()
    args = arguments(tmp_path, max_steps=3, contrast_prior_gradient=prior_gradient, logging_steps=1)
    trainer = ContinualTrainer(model, args, "das", random_blocks(24), processing_class=build_tokenizer(), domain="bio")
    trainer.train()
    das = trainer.methods[0]
    assert das.drops_units and das.importance.domains == ["general", "bio"]
    for part in das.importance.by_domain:
        assert all(0 < value.max() <= 1 for value in part.values())  # nothing is constant: the proxy is no zero
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 3 and all(entry["loss_contrast"] > 0 and entry["loss_clm"] > 0 for entry in history)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"activation_checkpointing": True}, 1e-5),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "contrast_weight": 0.0}, 1e-4),
        ({"bf16": True}, 2e-2),
    ],
)
def test_options_of_the_trainer_change_no_loss(options, tolerance, tmp_path):
    losses = []
    for given in ({"contrast_weight": options.get("contrast_weight", 1.0)}, options):
        args = arguments(tmp_path, logging_steps=1, **given)
        trainer = ContinualTrainer(tiny_llama(), args, "das", random_blocks(24), processing_class=build_tokenizer())
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=tolerance)


@pytest.fixture
def fresh_accelerate():
    """Whether it compiles is decided once per process, and told through the environment."""
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("build", [tiny_llama, tiny_roberta])
def test_compiled_models_take_new_gates_in_every_step(build, tmp_path, fresh_accelerate):
    """The gates of the views, the LM head's positions and the masks change from step to step; compiled code must not
    keep those of the first."""
    args = arguments(tmp_path, logging_steps=1)
    compiled = arguments(tmp_path, logging_steps=1, torch_compile=True, torch_compile_backend="aot_eager")
    runs = []
    for given in (compiled, args):
        AcceleratorState._reset_state(reset_partial_state=True)
        if given is args:
            for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO")]:
                del os.environ[name]
        model = build()
        counters.clear()
        trainer = ContinualTrainer(
            model, given, "das", random_blocks(24), {"bio": random_blocks(6, seed=5)},
            processing_class=build_tokenizer(),
        )  # fmt: skip
        trainer.train()
        assert (counters["frames"]["ok"] > 0) is (given is compiled)
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append([*history, trainer.evaluate()["eval_bio_loss"]])
    assert len(runs[0]) == 5 and runs[0] == pytest.approx(runs[1], rel=1e-5)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("method", ["das", "agem"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_cross_entropy_in_chunks(build, method, options, tmp_path):
    """The same losses and weights, and no tensor that holds the logits of all predictions."""
    runs, rows_of_logits = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[1] == VOCABULARY:
                rows_of_logits.append(len(result))
            return result

    for chunked in (False, True):
        model = build()
        args = arguments(tmp_path, logging_steps=1, chunked_cross_entropy=chunked, memory_size=4, **options)
        trainer = ContinualTrainer(model, args, method, random_blocks(24), processing_class=build_tokenizer())
        trainer.train()
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((history, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])))
        rows_of_logits.clear()
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        with Watch():
            trainer.compute_loss(model, batch, num_items_in_batch=44).backward()
        assert (44 in rows_of_logits) is not chunked, rows_of_logits
    assert runs[1][0] == pytest.approx(runs[0][0], rel=2e-2 if "bf16" in options else 1e-5)
    difference = (runs[1][1] - runs[0][1]).abs()
    assert difference.mean() < (1e-4 if "bf16" in options else 1e-6)


def test_cross_entropy_that_chunks_cannot_compute(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 30.0}
    capped = Gemma2ForCausalLM(Gemma2Config(**SHAPE, **shape))
    for model, method in ((capped, "naive"), (tiny_roberta(), "naive"), (tiny_gpt2(), "lwf")):
        args = arguments(tmp_path, chunked_cross_entropy=True)
        with pytest.raises(UserError, match="^chunked_cross_entropy: .*; leave it off"):
            ContinualTrainer(model, args, method, random_blocks(8), processing_class=build_tokenizer()).train()
    with pytest.raises(ValueError, match="^chunked_cross_entropy: .*label smoothing"):
        arguments(tmp_path, chunked_cross_entropy=True, label_smoothing_factor=0.1)


METHODS_OF_LANGUAGE_MODELS = [name for name in METHODS if name not in ("naive", "das")]
OPTIONS = {
    "gem": {"memory_size": 4},
    "ncl": {"optim": "sgd", "max_grad_norm": 0.0},
    "scp": {"scp_projections": 2},
    "self_replay": {"memory_size": 8, "self_replay_target": "distributions", "replay_ratio": 0.5},
}


@pytest.mark.parametrize("method", METHODS_OF_LANGUAGE_MODELS)
def test_every_method_learns_two_domains(method, tmp_path):
    model, tokenizer, methods = tiny_llama(), build_tokenizer(), [METHODS[method]()]
    held_out = {name: random_blocks(6, seed=seed) for name, seed in (("bio", 1), ("cs", 2))}
    blocks = {name: random_blocks(16, seed=seed) for name, seed in (("bio", 1), ("cs", 2))}
    losses = []
    for number, domain in enumerate(("bio", "cs")):
        args = arguments(tmp_path / domain, **OPTIONS.get(method, {}))
        names = ["bio", "cs"][: number + 1] if methods[0].needs_earlier_domains else [domain]
        train = TrainingBlocks({name: blocks[name] for name in names}, NextTokens(), args.seed)
        trainer = ContinualTrainer(
            model, args, methods, train, held_out, processing_class=tokenizer, domain=domain,
            development_dataset=held_out,
        )  # fmt: skip
        losses.append(trainer.evaluate()[f"eval_{domain}_loss"])
        trainer.train()
        losses.append(trainer.evaluate()[f"eval_{domain}_loss"])
    assert np.isfinite(losses).all() and losses[1] != losses[0]


def test_self_replay_writes_what_the_model_says(tmp_path):
    """From a model that has one thing to say after each token, sampling says it."""
    model = tiny_gpt2()
    with torch.no_grad():  # what follows is a function of the token alone: the next word
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1)
        model.transformer.wte.weight.copy_(torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(0)))
    args = arguments(tmp_path, memory_size=3, max_length=10)
    trainer = ContinualTrainer(model, args, "self_replay", random_blocks(8), processing_class=build_tokenizer())
    drawn = [row["input_ids"] for row in Writer(trainer).rows(3)]
    assert len(drawn) == 3 and all(block.shape == (10,) and block[0] == BOS for block in drawn)
    assert all(PAD not in block[1:].tolist() for block in drawn)  # special tokens but the end of a text are not drawn


# ---- the walk ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("causal")
    tiny_llama().save_pretrained(root / "model")
    build_tokenizer().save_pretrained(root / "model")
    write_texts(root)
    (root / "recipe.yaml").write_text(
        f"""
model_name_or_path: {root}/model
output_dir: {root}/unused
domains: [{{name: bio, data: {root}/bio.txt}}, {{name: cs, data: {root}/cs.txt}}]
measure: [{{name: old, data: {root}/old.txt}}]
training: {{max_length: 24, max_steps: 4, per_device_train_batch_size: 4, importance_samples: 8, save_steps: 2,
           learning_rate: 1e-3, disable_tqdm: true, use_cpu: true, report_to: none}}
"""
    )
    return root


def test_the_walk_and_its_measures(world, tmp_path, capsys):
    command = ["--recipe", str(world / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main(["pretrain", *command]) == 0
    results = Results.load(tmp_path / "run")
    assert results.unit == "nats per token" and results.measures == ["loss", "bits_per_byte", "accuracy"]
    for stage in results.stages:
        for score in stage["scores"].values():
            assert score["perplexity"] == pytest.approx(np.exp(score["loss"]))
            nats = score["loss"] * score["tokens"]
            assert score["bits_per_byte"] == pytest.approx(nats / score["bytes"] / np.log(2))
    assert set(results.intervals) == {"loss", "bits_per_byte", "accuracy"}
    card = (tmp_path / "run" / "2-cs" / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and "text-generation" in card and "masked" not in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "2-cs")

    with open(tmp_path / "questions.jsonl", "w") as file:
        print(json.dumps({"text": "w1 ___ w2", "answer": "w3", "choices": ["w3", "w4 w5"]}), file=file)
    options = ["--cloze", f"bio={tmp_path}/questions.jsonl"]
    assert main(["evaluate", "--run", str(tmp_path / "run"), *options]) == 0
    assert Results.load(tmp_path / "run").stages[2]["cloze"]["bio"]["asked"] == 1
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--pseudo_perplexity", "2"]) == 2
    assert "pseudo_perplexity: is of masked language models" in capsys.readouterr().err


def test_an_interrupted_walk_ends_as_an_uninterrupted_one(world, tmp_path, monkeypatch):
    command = ["pretrain", "--recipe", str(world / "recipe.yaml"), "--output_dir"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    step = ContinualTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.domain == "cs" and self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ContinualTrainer, "training_step", interrupted)
        assert main([*command, str(tmp_path / "run")]) == 130
    assert main([*command, str(tmp_path / "run"), "--resume"]) == 0
    assert (Results.load(tmp_path / "run").matrix() == Results.load(tmp_path / "whole").matrix()).all()
