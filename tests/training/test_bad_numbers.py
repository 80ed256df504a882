"""NaN and infinity: the run stops before they reach the weights, says where they came up, and keeps what was good. A
gradient that overflows in fp16 is skipped, and leaves no trace in any method."""

import math
import re

import pytest
import torch
from transformers import TrainerCallback

from das_lm.errors import UserError
from das_lm.files import broken_file
from das_lm.methods import EWC
from das_lm.training.guard import Guard
from tests.distributed import run_in_two_processes
from tests.training.helpers import Extra, assert_equal, parameters, run_of, trainer_of
from tests.training.test_trainer import tiny_roberta

NUMBERS = {"nan": math.nan, "inf": math.inf}


class After(TrainerCallback):
    """Does something to the model when a step has ended."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.what(model)


def spoil(model):
    model.roberta.encoder.layer[1].output.dense.weight.data[0, 0] = math.nan


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize("batch", [0, 1])
def test_part_of_the_loss_is_named_and_the_step_not_taken(value, batch, tmp_path):
    """In either of two accumulated batches; the Trainer's filter, which would hide it from the log, hides nothing."""
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    run = trainer_of(
        tmp_path, method=[Extra(4, NUMBERS[value], batch)], logging_nan_inf_filter=True, domain="law", **options
    )
    with pytest.raises(UserError) as error:
        run.train()
    assert str(error.value) == (
        f"loss_extra: the loss of domain 'law' is {value} at step 4; try a smaller learning_rate, a smaller "
        f"max_grad_norm, or bf16 instead of fp16. {tmp_path}/checkpoint-2 holds the last good weights: start a new "
        "run there (--model_name_or_path)"
    )
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert broken_file(tmp_path / "checkpoint-2") is None
    before = run_of(tmp_path / "other", method="naive", domain="law", **{**options, "max_steps": 3})
    assert_equal(parameters(run.model), parameters(before.model))


def test_nothing_is_said_of_weights_that_were_bad_before(tmp_path):
    with pytest.raises(UserError, match="at step 1; try .* fp16$"):
        run_of(tmp_path, method=[Extra(1)])


def test_last_good_weights_may_be_those_that_were_loaded(tmp_path):
    model = tiny_roberta()
    model.name_or_path = "output/1-bio"
    with pytest.raises(UserError, match="fp16. output/1-bio holds the last good weights"):
        run_of(tmp_path, model=model, method=[Extra(2)])


# ---- the gradient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_gradient(value, clip, tmp_path):
    """The loss is finite, its gradient is not: the weights stay those of the step before."""
    run = trainer_of(tmp_path, method="naive", max_grad_norm=clip)
    run.model.roberta.embeddings.LayerNorm.weight.register_hook(
        lambda gradient: gradient * (NUMBERS[value] if run.state.global_step == 1 else 1)
    )
    with pytest.raises(
        UserError, match="^the loss is finite: the gradient of domain 'bio' is (nan|inf) at step 2; try"
    ):
        run.train()
    assert_equal(
        parameters(run.model), parameters(run_of(tmp_path, method="naive", max_grad_norm=clip, max_steps=1).model)
    )


def test_penalty(tmp_path):
    """The gradient of a penalty is no part of the loss; it is named all the same."""
    method = EWC()
    first = run_of(tmp_path, method=[method])
    method.importance["lm_head.dense.weight"][0, 0] = math.inf
    with pytest.raises(UserError, match="^penalty: the gradient of domain 'cs' is nan at step 1; try"):
        run_of(tmp_path, model=first.model, method=[method], domain="cs")


def test_the_step_is_looked_at_once(tmp_path, monkeypatch):
    """However many batches and parts of the loss it has: each look waits for the device."""
    looks, tolist = [], torch.Tensor.tolist
    run = trainer_of(tmp_path, contrast_prior_gradient=False, gradient_accumulation_steps=3, max_steps=2)
    check = Guard.check_step

    def counted(guard, norm):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda tensor: looks.append(len(tensor)) or tolist(tensor))
            patch.setattr(torch.Tensor, "item", lambda tensor: pytest.fail("a second look"))
            check(guard, norm)

    monkeypatch.setattr(Guard, "check_step", counted)
    run.train()
    assert looks == [3 * 2 + 1] * 2  # the two losses of three batches, and the norm


# ---- weights and importance ----------------------------------------------------------------------------------------


def test_bad_weights_are_not_saved(tmp_path):
    """Nor do they push out the good ones, where one checkpoint is kept."""
    with pytest.raises(
        UserError, match=r"domain 'bio', after step 3: the value of 1 of \d+ tensors, first of 'roberta"
    ) as e:
        run_of(
            tmp_path,
            method="naive",
            max_steps=6,
            callbacks=[After(3, spoil)],
            save_strategy="steps",
            save_steps=1,
            save_total_limit=1,
        )
    assert f"{tmp_path}/checkpoint-2 holds the last good weights" in str(e.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert broken_file(tmp_path / "checkpoint-2") is None


def test_bad_weights_are_not_consolidated(tmp_path):
    method = EWC()
    with pytest.raises(UserError, match="after step 3: the value of 1 of"):
        run_of(tmp_path, method=[method], callbacks=[After(3, spoil)])
    assert not method.importance


@pytest.mark.parametrize(
    ("method", "what", "options"),
    [
        ("das", "importance (gradient pass)", {}),
        ("ewc", "importance (ewc)", {}),
        ("mas", "importance (mas)", {}),
        ("scp", "importance (scp)", {"scp_projections": 2}),
        ("spg", "importance (spg)", {}),
        ("ncl", "Fisher information (ncl)", {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-4}),
        (
            "ncl",
            "Fisher information (ncl)",
            {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-4, "ncl_curvature": "kronecker"},
        ),
    ],
)
def test_importance(method, what, options, tmp_path):
    """Of the pass after the domain alone, which runs in evaluation mode; nothing is kept of it."""
    run = trainer_of(tmp_path, method=method, max_steps=1, contrast_weight=0.0, **options)
    module = run.model.roberta.encoder.layer[0].output.dense

    def spoilt(module, args, output):
        if not module.training and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.nan)

    module.register_forward_hook(spoilt)
    with pytest.raises(
        UserError, match=rf"domain 'bio', after step 1: the {re.escape(what)} of \d+ of \d+ tensors, first"
    ):
        run.train()
    if method == "das":
        assert run.methods[0].importance.domains == ["general"]
    elif method != "ncl":
        assert not run.methods[0].importance


def test_importance_of_the_proxy(tmp_path):
    """Of the pass before the domain, in which the parameters are frozen."""
    run = trainer_of(tmp_path, domain="law")
    module = run.model.roberta.encoder.layer[1].attention.output.dense

    def spoilt(module, args, output):
        if not module.weight.requires_grad and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)

    module.register_forward_hook(spoilt)
    with pytest.raises(
        UserError, match=r"'law', after step 0: the importance \(proxy pass\) of .* first of 'layers.0.head'"
    ):
        run.train()


@pytest.mark.parametrize("method", ["si", "rwalk"])
def test_importance_of_a_path(method, tmp_path):
    run = trainer_of(tmp_path, method=method, callbacks=[After(2, lambda model: spoil_path())], rwalk_interval=10)

    def spoil_path():
        kept = run.methods[0].path if method == "si" else run.methods[0].score
        kept["lm_head.dense.weight"][0, 0] = math.nan

    with pytest.raises(
        UserError, match=rf"importance \({method}\) of \d+ of \d+ tensors, first of 'lm_head.dense.weight'"
    ):
        run.train()


# ---- fp16 ----------------------------------------------------------------------------------------------------------


def fp16_run(directory, scale: float, **options):
    """In fp16 on the CPU, where accelerate makes no gradient scaler of its own, so that one is given."""
    run = trainer_of(directory, fp16=True, **options)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    run.accelerator.native_amp = True
    return run


class Overflows(TrainerCallback):
    """Looks at the parameters before and after every step."""

    def __init__(self):
        self.scales, self.moved = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = parameters(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.moved.append(any(not torch.equal(p, self.before[name]) for name, p in model.named_parameters()))
        assert all(p.isfinite().all() for p in model.parameters())


METHODS = {
    "das": {"contrast_weight": 0.0},
    "das, gradient": {"method": "das", "contrast_weight": 0.0, "soft_mask_target": "gradient", "optim": "sgd"},
    "spg": {},
    "ewc": {},
    "si": {},
    "rwalk": {"rwalk_interval": 2},
    "agem": {},
    "gem": {"gem_margin": 0.5},
    "ema": {"ema_decay": 0.5},
    "lwf": {},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_overflow_is_skipped(name, optim, tmp_path):
    """With a scale that is too large for fp16, the steps are left out until it is not: no parameter moves, whatever
    the mask, and what the methods read of the gradient stays finite. Decay would move them, too."""
    options = {"optim": optim, "method": name, "max_steps": 5, "weight_decay": 0.1, "memory_size": 8, **METHODS[name]}
    first = run_of(tmp_path, **{**options, "max_steps": 2})
    model = tiny_roberta()  # of the one that has trained, accelerate takes the forward for prepared
    model.load_state_dict(first.model.state_dict())
    seen = Overflows()
    run = fp16_run(
        tmp_path,
        2.0**28,
        model=model,
        domain="cs",
        callbacks=[seen],
        **{**options, "method": first.methods, "max_grad_norm": 0.0 if name == "gem" else 1.0},
    )
    run.accelerator.scaler._backoff_factor = 2.0**-10  # so that a few steps show both
    run.train()
    assert seen.moved[0] is False and seen.moved[-1] is True
    assert all(tensor.isfinite().all() for tensor in run.methods[0].state_dict().values())
    if name.startswith("das"):
        assert run.methods[0].importance.domains == ["general", "bio", "cs"]


def test_path_of_a_skipped_step_is_zero(tmp_path):
    """SI adds nothing for a step that was not taken."""
    run = fp16_run(tmp_path, 2.0**40, method="si", max_steps=1, callbacks=[seen := Overflows()])
    run.methods[0].end_domain = lambda: None
    run.train()
    assert seen.moved == [False]
    assert all(not path.any() for path in run.methods[0].path.values())


def test_gradient_that_no_scale_makes_finite(tmp_path):
    """The scaler would skip step after step for ever."""
    run = fp16_run(tmp_path, 4.0, method="naive", max_steps=20)
    run.model.roberta.embeddings.LayerNorm.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match="^the loss is finite: the gradient of domain 'bio' is nan at step 4; try"):
        run.train()


# ---- several processes ---------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import pytest
import torch
from das_lm.errors import UserError
from tests.training.test_bad_numbers import trainer_of
from tests.training.helpers import Extra

torch.set_num_threads(1)
class Mine(Extra):
    def loss(self, model, batch, outputs):
        (part,) = super().loss(model, batch, outputs).values()
        return {"extra": outputs.logits.sum() * (part.detach() if self.args.process_index == 1 else 0)}

with pytest.raises(UserError, match="^loss_extra: the loss of domain 'bio' is nan at step 2; try"):
    trainer_of(sys.argv[1], method=[Mine(2)]).train()
"""


def test_what_broke_in_one_process_is_said_by_all(tmp_path):
    """And none is left waiting for the other: its gradient is everybody's."""
    run_in_two_processes(SCRIPT, tmp_path, tmp_path / "output")
