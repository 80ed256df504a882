"""
Two real processes with FSDP2-sharded parameters train as one does on the whole batch, and as two under DDP:
importance, masked updates, loss curves, what methods keep, what is saved.

accelerate keeps FSDP for GPUs. `let_accelerate_shard` tells it that gloo ranks are such, so that all else is the path
of a launcher with `fsdp_version: 2`: the Trainer's own preparation of model and optimizer, its steps, its checkpoints.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForMaskedLM

from das_lm import ContinualTrainer, DASConfig
from das_lm.cli import main
from das_lm.errors import UserError
from das_lm.files import broken_file
from das_lm.measure.cache import model_fingerprint
from das_lm.measure.results import Results
from das_lm.methods import METHODS
from das_lm.units import Units
from das_lm.units.sharding import local, named_parameters, own_slice, whole
from das_lm.units.soft_mask import SoftMask
from tests.distributed import run_in_two_processes
from tests.helpers import build_tokenizer, random_batch, random_blocks, save_model, tiny_roberta
from tests.model.helpers import tiny_gpt2, tiny_llama

#: One domain. Without dropout: the views differ by drops through the gates, which are addressed by example. The masked
#: language model has its embeddings tied to the head, GPT-2 too, and Llama not.
MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama}
DAS_RUNS = {
    "with contrast": {"optim": "sgd", "learning_rate": 0.05},
    "AdamW, no gradient through the prior": {"contrast_prior_gradient": False, "learning_rate": 1e-3},
    "masked gradients, accumulated": {
        "contrast_weight": 0.0,
        "gradient_accumulation_steps": 2,
        "soft_mask_target": "gradient",
        "optim": "sgd",
        "learning_rate": 0.05,
    },
}
DAS_RUNS |= {name: {"optim": "sgd", "learning_rate": 0.05} for name in MODELS}
#: Two domains, the second from what the first one saved.
METHOD_RUNS = ["naive", "ewc", "replay", "mas si interpolate", "rwalk l2 ema", "anchor"]
DDP_RUNS = ["with contrast", "naive", "ewc", "replay"]
SCRIPT = """
import sys
import torch
from tests.distributed import test_fsdp

torch.set_num_threads(1)
test_fsdp.in_two_processes(*sys.argv[1:])
"""


def let_accelerate_shard():
    original = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        shared = PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = init


def arguments(directory, shards=True, **options) -> DASConfig:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    common = {
        "max_steps": 4,
        "max_length": 12,
        "importance_samples": 13,
        "importance_batch_size": 6,  # of two processes one has two batches, the other one
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
        "per_device_train_batch_size": 8 // processes,
        "per_device_eval_batch_size": 4,
    }
    if processes > 1 and shards:
        common |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    return DASConfig(output_dir=f"{directory}/output", **{**common, **options})


def make_trainer(model, args, method, domain=0) -> ContinualTrainer:
    return ContinualTrainer(
        model,
        args,
        method,
        train_dataset=random_blocks(40, seed=domain),
        eval_dataset={"bio": random_blocks(7, seed=9)},
        processing_class=build_tokenizer(),
        domain=f"domain {domain}",
    )


def train(directory, runs=(*DAS_RUNS, *METHOD_RUNS), shards=True):
    """Make runs: the same in one process, and in two."""
    directory = Path(directory)
    for name in runs:
        if name in DAS_RUNS:
            model, args = MODELS.get(name, tiny_roberta)(), arguments(directory, shards, **DAS_RUNS[name])
            trainer = make_trainer(model, args, "das")
            before = trainer.evaluate()
            trainer.train()
            _finish(trainer, directory / name, before)
            continue
        options = {"penalty_weight": 0.1, "fisher": "empirical", "rwalk_interval": 2, "interpolation_alpha": 0.7}
        options |= {"replay_ratio": 0.5, "memory_size": 10, "optim": "sgd", "learning_rate": 0.02}
        if name == "anchor":
            options |= {
                "anchor_teacher": "cached",
                "anchor_variants": 2,
                "self_replay_sweeps": 1,
                "drift_budget": 0.01,
            }
        model = tiny_roberta()
        for domain in range(2):
            trainer = make_trainer(model, arguments(directory, shards, **options), name.split(), domain)
            trainer.train()
            place = directory / f"{name} {domain}"
            _finish(trainer, place)
            model = AutoModelForMaskedLM.from_pretrained(place)


def _finish(trainer, place, before=None):
    """Measure and save; the main process writes down what came out."""
    facts = {"before": before, "metrics": trainer.evaluate(), "fingerprint": model_fingerprint(trainer.model)}
    trainer.save_model(str(place))
    trainer.accelerator.wait_for_everyone()
    facts["logs"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    facts["sharded"] = all(isinstance(one, DTensor) for one in named_parameters(trainer.model).values())
    facts["slices"] = [local(one).numel() for one in named_parameters(trainer.model).values()]
    if trainer.is_world_process_zero():
        (place / "facts.json").write_text(json.dumps(facts))


# ---- what the two processes do -----------------------------------------------------------------------------------


def in_two_processes(directory, recipe, model):
    """All that needs two processes, in one pair of them."""
    train(f"{directory}/ddp", DDP_RUNS, shards=False)
    let_accelerate_shard()
    train(directory)
    check_slices()
    for optim in ("AdamW", "SGD"):
        for target in ("update", "gradient"):
            check_masked_steps(optim, target)
    check_resume(directory)
    check_next_domain(directory)
    for method in ("agem", "gem", "lwf", "ncl", "scp", "spg"):
        options = {"optim": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0}
        with pytest.raises(UserError, match=f"method: '{method}' needs whole parameters"):
            make_trainer(tiny_roberta(), arguments(directory, **options), method)
    with pytest.raises(UserError, match="importance"):  # one block for two processes
        make_trainer(tiny_roberta(), arguments(directory, importance_samples=1), "das").train()
    walk(f"{directory}/walk", recipe, model)
    Path(directory, f"done {dist.get_rank()}").touch()


@contextmanager
def nothing_gathered():
    """Nobody may make a sharded tensor whole meanwhile."""

    def refuse(self, *args, **kwargs):
        raise AssertionError("a whole parameter was gathered")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", refuse)
        patch.setattr(DTensor, "redistribute", refuse)
        yield


def sharded_roberta():
    model = tiny_roberta()
    for layer in model.roberta.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def check_slices():
    """Cut and put together again, also where there are fewer rows than processes."""
    model, plain = sharded_roberta(), dict(tiny_roberta().named_parameters())
    for name, parameter in named_parameters(model).items():
        assert torch.equal(own_slice(plain[name].detach(), parameter), local(parameter)), name
        assert torch.equal(whole(local(parameter), parameter), plain[name]), name
    row = named_parameters(model)["roberta.embeddings.token_type_embeddings.weight"]
    assert row.shape[0] == 1 and local(row).shape[0] == (1 if dist.get_rank() == 0 else 0)
    weight = named_parameters(model)["roberta.encoder.layer.0.output.dense.weight"]
    assert own_slice(torch.arange(64.0)[None], weight).shape == (1, 64)  # what broadcasts along the rows
    assert own_slice(torch.arange(32.0)[:, None], weight)[:, 0].tolist() == [
        16.0 * dist.get_rank() + i for i in range(16)
    ]


def check_masked_steps(optim, target):
    """Three steps of an optimizer are those of the whole model on the whole batch; units of importance 1 stay."""
    plain, model = tiny_roberta(), sharded_roberta()
    generator = torch.Generator().manual_seed(1)
    importance = {key: torch.rand(size, generator=generator) for key, size in Units(plain).sizes.items()}
    for value in importance.values():
        value[::3], value[1::3] = 1.0, 0.0
    batch = random_batch([10] * 8)
    mine = {name: value[dist.get_rank() * 4 :][:4] for name, value in batch.items()}
    predicted = (batch["labels"] != -100).sum()
    before = {name: local(one).clone() for name, one in named_parameters(model).items()}
    for one, rows, share in ((plain, batch, 1), (model, mine, 2)):
        options = {} if optim == "AdamW" or target == "gradient" else {"momentum": 0.9}
        optimizer = getattr(torch.optim, optim)(
            one.parameters(), lr=0.003, weight_decay=0.1 * (target == "update"), **options
        )
        mask = SoftMask(Units(one), importance, target)
        for _ in range(3):
            logits = one(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows["labels"].flatten(), reduction="sum")
            (losses * share / predicted).backward()
            with nothing_gathered():
                mask.before_step()
                optimizer.step()
                mask.mask_step()
            optimizer.zero_grad()
    expected, moved = dict(plain.named_parameters()), 0
    for name, parameter in named_parameters(model).items():
        moved += not torch.equal(local(parameter), before[name])
        if not name.endswith("key.bias"):  # no gradient but rounding, of which Adam makes whole steps
            value = own_slice(expected[name].detach(), parameter)
            torch.testing.assert_close(local(parameter), value, rtol=0, atol=1e-6, msg=f"{name}, {optim}, {target}")
    assert moved > 20
    if target == "gradient" and optim == "AdamW":
        return  # Adam makes a full step of any gradient, but of one that is 0
    for piece in Units(plain).slices:
        parameter = named_parameters(model)[piece.parameter]
        held_back = own_slice(piece.spread(importance[piece.group], parameter.ndim), parameter)
        kept = (held_back == 1).expand_as(local(parameter))
        assert torch.equal(local(parameter)[kept], before[piece.parameter][kept]), piece.parameter


def check_resume(directory):
    """A run that goes on from a checkpoint in its middle ends with the same bits."""
    options = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2, "penalty_weight": 0.1}
    results = []
    for resume in (None, f"{directory}/resumed/output/checkpoint-2"):
        trainer = make_trainer(tiny_roberta(), arguments(f"{directory}/resumed", **options), ["das", "si"])
        trainer.train(resume_from_checkpoint=resume)
        results.append(trainer)
    parameters = [{n: local(p) for n, p in named_parameters(one.model).items()} for one in results]
    states = [one.methods[1].state_dict() for one in results]
    for first, second in (parameters, states, [one.methods[0].importance.values for one in results]):
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def check_next_domain(directory):
    """The model itself, sharded as it is, and the method go on to another domain."""
    model, ewc = tiny_roberta(), METHODS["ewc"]()
    for domain in range(2):
        options = {"optim": "sgd", "learning_rate": 0.02, "penalty_weight": 0.1, "fisher": "empirical"}
        trainer = make_trainer(model, arguments(directory, **options), ewc, domain)
        trainer.train()
        model = trainer.model
    trainer.save_model(f"{directory}/ewc as it is")


def walk(output, recipe, model):
    """A whole recipe, with what `accelerate launch` puts into the environment for `fsdp_version: 2`."""
    options = ["--optim", "sgd", "--learning_rate", "0.5", "--method", "das", "replay", "--replay_ratio", "0.5"]
    options += ["--per_device_train_batch_size", str(4 // int(os.environ.get("WORLD_SIZE", "1")))]
    with pytest.MonkeyPatch.context() as patch:
        if "WORLD_SIZE" in os.environ:
            patch.setattr("das_lm.run.live.finish", lambda output: output / "report.html")
            patch.setenv("ACCELERATE_USE_FSDP", "true")
            patch.setenv("FSDP_VERSION", "2")
            patch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
            patch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
        command = ["pretrain", "--recipe", recipe, "--model_name_or_path", model, "--output_dir", output]
        assert main([*command, *options]) == 0


# ---- and what one process does -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, world):
    """Directories of the runs in this process with batches of 8, and in two others that shard, with 4 each."""
    directory = tmp_path_factory.mktemp("fsdp")
    one, two, recipe = directory / "one", directory / "two", str(world / "recipe.yaml")
    one.mkdir()
    two.mkdir()
    model = str(save_model(tiny_roberta(), directory / "model"))
    run_in_two_processes(SCRIPT, directory, two, recipe, model)
    train(one)
    walk(str(one / "walk"), recipe, model)
    return one, two


def test_all_checks_of_the_ranks_were_made(outputs):
    assert (outputs[1] / "done 0").is_file() and (outputs[1] / "done 1").is_file()


def stages(runs):
    return [name for run in runs for name in ([run] if run in DAS_RUNS else [f"{run} 0", f"{run} 1"])]


@pytest.mark.parametrize("name", [*stages([*DAS_RUNS, *METHOD_RUNS]), *(f"ddp/{name}" for name in stages(DDP_RUNS))])
def test_two_processes_equal_one(name, outputs):
    outputs = outputs[0] / name.removeprefix("ddp/"), outputs[1] / name
    one, two = (json.loads((output / "facts.json").read_text()) for output in outputs)
    shards = not name.startswith("ddp/")
    assert (one["sharded"], two["sharded"]) == (False, shards)
    assert sum(two["slices"]) < 0.6 * sum(one["slices"]) or not shards
    assert len(one["logs"]) == 4
    for ours, theirs in zip(one["logs"], two["logs"], strict=True):
        for part in (part for part in ours if part.startswith("loss") or part in ("grad_norm", "penalty")):
            assert theirs[part] == pytest.approx(ours[part], rel=1e-4, abs=1e-6), part
    for when in ("before", "metrics") if one["before"] else ("metrics",):
        for figure in ("loss", "accuracy", "tokens", "documents"):
            assert two[when][f"eval_bio_{figure}"] == pytest.approx(one[when][f"eval_bio_{figure}"], rel=1e-4)
    files = [{path.name for path in output.iterdir()} for output in outputs]
    assert files[0] == files[1] and "model.safetensors" in files[0]
    for file in (file for file in files[0] if file.endswith(".safetensors")):
        one, two = (load_file(output / file) for output in outputs)
        assert one.keys() == two.keys(), file
        for key, value in one.items():
            if key.endswith("key.bias") and file != "importance.safetensors":
                continue  # no gradient but rounding: it shifts all scores of a query alike
            importance = {"importance.safetensors": 1e-5, "ewc.safetensors": 1e-5}.get(file, 1e-4)
            tolerance = importance * max(1.0, float(value.double().abs().max()))
            torch.testing.assert_close(two[key], value, rtol=0, atol=tolerance, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.parametrize("name", ["with contrast", "ewc 1"])
def test_what_is_saved_is_whole(name, outputs):
    """A plain transformers directory, which says the same as the sharded model did."""
    place = outputs[1] / name
    assert {path.suffix for path in place.iterdir()} <= {".json", ".safetensors", ".md", ".txt"}
    assert json.loads((place / "config.json").read_text())["architectures"] == ["RobertaForMaskedLM"]
    model = AutoModelForMaskedLM.from_pretrained(place)
    assert model_fingerprint(model) == json.loads((place / "facts.json").read_text())["fingerprint"]


def test_a_sharded_model_goes_on_as_a_saved_one(outputs):
    saved, here = (load_file(outputs[1] / name / "model.safetensors") for name in ("ewc 1", "ewc as it is"))
    assert saved.keys() == here.keys()
    for key, value in saved.items():
        torch.testing.assert_close(here[key], value, rtol=0, atol=1e-6, msg=key)


def test_a_recipe(outputs):
    one, two = (Results.load(output / "walk") for output in outputs)
    assert two.run["processes"] == 2
    assert two.matrix() == pytest.approx(one.matrix(), abs=1e-4)
    assert abs(one.matrix()[2] - one.matrix()[0]).max() > 0.1  # the runs have learned something
    for stage in ("1-bio", "2-cs"):
        assert broken_file(outputs[1] / "walk" / stage) is None
    one, two = (load_file(output / "walk" / "2-cs" / "importance.safetensors") for output in outputs)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-4, msg=key)


def test_other_ways_to_shard_are_refused(tmp_path, monkeypatch):
    def trainer(**options):
        args = DASConfig(str(tmp_path), use_cpu=True, report_to=[], **options)
        return ContinualTrainer(tiny_roberta(), args, processing_class=build_tokenizer())

    with monkeypatch.context() as patch, pytest.raises(UserError, match="deepspeed: .* FSDP2"):
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        trainer()
    with pytest.raises(UserError, match="deepspeed: .* FSDP2"):
        trainer(deepspeed={"zero_optimization": {"stage": 2}})
    with pytest.raises(UserError, match="fsdp: version 1 .* fsdp_version: 2"):
        trainer(fsdp=True, fsdp_config={"version": 1})
    with pytest.raises(UserError, match="fsdp: there is one process"):
        trainer(fsdp=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="fsdp: version 1"):
        trainer()
