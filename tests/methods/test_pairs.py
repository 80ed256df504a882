"""Every pair of methods: in both orders of naming the same weights and state, bit for bit, or refused with the reason;
and what each method promises, it keeps in company."""

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from das_lm import ContinualTrainer, DASConfig
from das_lm.errors import UserError
from das_lm.methods import METHODS
from das_lm.methods.penalty import Penalty
from tests.helpers import build_tokenizer, random_blocks, tiny_roberta

NAMES = sorted(METHODS.keys() - {"naive", "joint"})  # these do nothing of their own
PENALTIES = [name for name in NAMES if issubclass(METHODS[name], Penalty)]
REFUSED = {("agem", "gem")} | {
    tuple(sorted(("ncl", one))) for one in ("das", "spg", "agem", "gem", "pull_back", *PENALTIES)
}
OPTIONS = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 8, "importance_samples": 4,
    "memory_size": 8, "replay_ratio": 0.4, "penalty_weight": 10.0, "scp_projections": 2, "rwalk_interval": 2,
    "self_replay_sweeps": 1, "ema_decay": 0.6, "contrast_prior_gradient": False, "use_cpu": True,
    "disable_tqdm": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no",
}  # fmt: skip


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, inputs, labels=None):
        logits = self.head(torch.tanh(self.body(inputs)))
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(12, 6, generator=generator), torch.randint(4, (12,), generator=generator)
    return [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


class Watch(TrainerCallback):
    """The weights before the first step and after each, and what should hold meanwhile."""

    def __init__(self, methods):
        self.methods, self.weights, self.theirs, self.path = methods, [], [], {}

    def see(self, trainer):
        gradient_of = trainer.gradient_of  # of a batch of a memory
        trainer.gradient_of = lambda batch: self.theirs.append(gradient_of(batch)) or self.theirs[-1]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(values(model))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        for one in self.theirs:  # agem, gem: they had the last word on the gradient
            theirs = torch.cat([gradient.flatten() for gradient in one])
            assert nn.functional.cosine_similarity(ours, theirs, dim=0) > -1e-5
        self.theirs.clear()

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.weights.append(values(model))
        if "lwf" in self.methods and self.methods["lwf"].teacher:  # it is the model before the domain
            assert same(values(self.methods["lwf"].teacher.model), self.weights[0])
        for name, kept in {"si": "path", "rwalk": "score"}.items():
            if name in self.methods:
                self.path |= {name: one.clone() for name, one in getattr(self.methods[name], kept).items()}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def everything(model: nn.Module, methods: dict) -> dict[str, torch.Tensor]:
    """Weights, and the state of all methods."""
    found = values(model)
    for name, method in methods.items():
        state = method.importance.values if name == "das" else method.state_dict()
        found |= {f"{name}/{key}": tensor.clone() for key, tensor in state.items()}
    return found


def hold(model: nn.Module, methods: dict, units) -> dict[str, torch.Tensor]:
    """Give the first unit of each group (das) and the first entry of each parameter (spg) the importance 1; where
    parameters must stay."""
    held = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    if "das" in methods:
        for importance in methods["das"].importance.values.values():
            importance[0] = 1
        for piece in units.slices:
            first = torch.zeros_like(methods["das"].importance.values[piece.group])
            first[0] = 1
            held[piece.parameter] |= piece.spread(first, held[piece.parameter].ndim) == 1
    if "spg" in methods:
        for name, importance in methods["spg"].importance.items():
            importance.view(-1)[0] = 1
            held[name].view(-1)[0] = True
    return held


def learn(directory, names, **options) -> dict[str, torch.Tensor]:
    """Two domains; everything that came out."""
    language = any(METHODS[name].language_models_only for name in names)
    model = tiny_roberta(num_hidden_layers=1, hidden_size=16, intermediate_size=16) if language else Classifier()
    methods = {name: METHODS[name]() for name in names}
    for domain in range(2):
        trainer = learn_domain(directory, model, methods, domain, language, **options)
    found = everything(model, methods)
    if "replay" in names:
        data = trainer.train_dataset
        rows = [data[position]["replayed_from"] for position in range(len(data))]
        found["replayed"] = torch.tensor(rows) == data.number_of("Replay")
    return found


def learn_domain(
    directory, model: nn.Module, methods: dict, domain: int, language: bool, **options
) -> ContinualTrainer:
    """With a look at what the methods promise."""
    own_step = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1} if "ncl" in methods else {}
    args = DASConfig(str(directory), **{**OPTIONS, **own_step, **options})
    watch = Watch(methods)
    trainer = ContinualTrainer(
        model, args, list(methods.values()), random_blocks(12, 8, seed=domain) if language else rows(domain),
        processing_class=build_tokenizer() if language else None, domain=f"domain {domain}", callbacks=[watch],
    )  # fmt: skip
    watch.see(trainer)
    held = hold(model, methods, trainer.units) if domain else {}
    trainer.train()
    (start, *steps), end = watch.weights, values(model)
    assert len(steps) == 3 and not same(start, steps[0])

    for name, stays in held.items():  # das, spg: what has importance 1 does not move
        assert all(torch.equal(one[name][stays], start[name][stays]) for one in (*steps, end)), name
        if name in watch.path:  # si, rwalk: what did not move did not lower the loss
            assert watch.path[name].any() and not watch.path[name][stays].any(), name
    expected = steps[-1]
    if "ema" in methods:
        expected = start
        for step in steps:
            expected = {name: torch.lerp(expected[name], value, 0.4) for name, value in step.items()}
    if "interpolate" in methods:
        expected = {name: torch.lerp(start[name], value, 0.5) for name, value in expected.items()}
    for name, value in end.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=name)
    for name in methods.keys() & {*PENALTIES, "ncl"}:  # what is consolidated are the final weights
        if not (domain and name == "ewc"):  # which keeps the mean of its anchors
            assert same(methods[name].mean if name == "ncl" else methods[name].anchor, end)
    return trainer


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Of replay: where rows are replayed. Of self_replay: what the base model wrote."""
    directory = tmp_path_factory.mktemp("alone")
    replayed = learn(directory, ["replay"])["replayed"]
    written = learn(directory, ["self_replay"])
    assert replayed.any()
    return {"replayed": replayed, **{key: one for key, one in written.items() if key.startswith("self_replay/")}}


@pytest.mark.parametrize("first", NAMES[:-1])
def test_pairs(first, alone, tmp_path):
    for second in NAMES[NAMES.index(first) + 1 :]:
        if (first, second) in REFUSED:
            for names in ((first, second), (second, first)):
                with pytest.raises(UserError, match=r"^method: '.*take one$"):
                    learn(tmp_path, names)
            continue
        found = learn(tmp_path, (first, second))
        assert same(found, learn(tmp_path, (second, first))), second
        shared = found.keys() & alone.keys()
        assert same({key: found[key] for key in shared}, {key: alone[key] for key in shared}), second


@pytest.mark.parametrize("mask", ["das", "spg"])
@pytest.mark.parametrize("other", ["ewc", "si", "lwf", "ema"])
def test_masks_of_the_gradient_hold_in_company(mask, other, tmp_path):
    """What has importance 1 does not move, whatever the other method adds to the gradient."""
    options = {"soft_mask_target": "gradient", "optim": "sgd", "learning_rate": 0.1}
    learn(tmp_path, (mask, other), **options)


def test_a_method_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^method: 'ema' stands there twice"):
        ContinualTrainer(Classifier(), DASConfig(str(tmp_path), **OPTIONS), ["ema", "si", "ema"], rows(0))


def test_two_penalties_are_logged_as_their_sum(tmp_path):
    model, methods = Classifier(), {"l2": METHODS["l2"](), "mas": METHODS["mas"]()}
    trainer = learn_domain(tmp_path, model, methods, 0, False)
    with torch.no_grad():
        model.body.weight += 0.1
    trainer.log({"loss": 0.0})
    both = [method.value() for method in methods.values()]
    assert min(both) > 0 and trainer.state.log_history[-1]["penalty"] == pytest.approx(sum(both))


@pytest.mark.parametrize("method", ["si", "rwalk"])
def test_the_importance_of_a_path_is_that_of_the_steps(method, tmp_path):
    """What the weights become when the steps are done (an average, an interpolation) is no part of the path."""
    importances = []
    for others in ((), ("ema", "interpolate")):
        methods = {name: METHODS[name]() for name in (method, *others)}
        learn_domain(tmp_path, Classifier(), methods, 0, False)
        importances.append(methods[method].importance)
    assert same(*importances) and importances[0]["body.weight"].any()
