"""Two kinds of models with two domains each, for every method."""

import torch
from torch import nn

from das_lm import ContinualTrainer, DASConfig
from das_lm.files import newest_checkpoint
from das_lm.methods import METHODS
from tests.helpers import build_tokenizer, random_blocks, tiny_roberta

#: Field -> a method that reads it, its other value, and options that both runs share.
METHOD_KNOBS = {
    "penalty_weight": ("l2", 0.5, {}),
    "fisher": ("ewc", "empirical", {}),
    "ewc_mode": ("ewc", "online", {}),
    "ewc_decay": ("ewc", 0.2, {"ewc_mode": "online"}),
    "si_damping": ("si", 0.01, {}),
    "rwalk_decay": ("rwalk", 0.1, {"rwalk_interval": 1}),
    "rwalk_interval": ("rwalk", 1, {"rwalk_interval": 2}),
    "scp_projections": ("scp", 3, {}),
    "memory_size": ("replay", 3, {"replay_ratio": 0.5}),
    "replay_ratio": ("replay", 0.9, {"replay_ratio": 0.2}),
    "self_replay_target": ("self_replay", "distributions", {"replay_ratio": 0.5}),
    "self_replay_sweeps": ("self_replay", 1, {"replay_ratio": 0.5}),
    "anchor_weight": ("anchor", 5.0, {"anchor_share": 1.0}),
    "anchor_share": ("anchor", 0.5, {}),
    "anchor_teacher": ("anchor", "cached", {}),
    "anchor_refresh": ("anchor", 1, {"anchor_teacher": "copy"}),
    "anchor_draws": ("anchor", 3, {"anchor_teacher": "cached"}),
    "anchor_variants": ("anchor", 1, {"anchor_teacher": "cached"}),
    "keep_text": ("anchor", False, {}),
    "drift_budget": ("anchor", 1e-4, {}),
    "pull_back": ("pull_back", 0.5, {"pull_back_every": 2}),
    "pull_back_every": ("pull_back", 3, {"pull_back_every": 2}),
    "token_weighting": ("gate", "entropy", {}),
    "stm_perplexity": ("gate", 100.0, {"token_weighting": "stm"}),
    "interpolation_slope": ("interpolate", 0.3, {}),
    "lwf_weight": ("lwf", 1.0, {}),
    "lwf_temperature": ("lwf", 1.0, {}),
    "interpolation_alpha": ("interpolate", "0.9", {}),
    "ema_decay": ("ema", 0.5, {}),
    "gem_margin": ("gem", 0.5, {"memory_size": 8}),
    "ncl_curvature": ("ncl", "kronecker", {}),
    "ncl_prior": ("ncl", 3.0, {}),
    "ncl_radius": ("ncl", 1e-3, {}),
}

#: What a method needs beside the options below.
NEEDS = {"ncl": {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}}

SMALL = {"memory_size": 8, "scp_projections": 2, "self_replay_sweeps": 2, "rwalk_interval": 2, "replay_ratio": 0.5}


class Classifier(nn.Module):
    """A module that returns a loss: two layers, four classes."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, inputs, labels=None):
        logits = self.head(torch.tanh(self.body(inputs)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def rows(seed: int, count: int = 24) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    return [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


class World:
    """A kind of model, and two domains for it."""

    def __init__(self, kind: str):
        self.kind = kind

    def model(self) -> nn.Module:
        return tiny_roberta(0.1) if self.kind == "language model" else Classifier()

    def train(self, directory, model, method, domain: int, resume=False, remember=None, **options) -> ContinualTrainer:
        name = method if isinstance(method, str) else next(n for n, m in METHODS.items() if type(method) is m)
        arguments = DASConfig(
            output_dir=str(directory),
            **{
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "max_length": 12,
                "importance_samples": 8,
                "use_cpu": True,
                "disable_tqdm": True,
                "report_to": [],
                "save_strategy": "steps",
                "save_steps": 3,
                **SMALL,
                **NEEDS.get(name, {}),
                **options,
            },
        )
        language = self.kind == "language model"
        data = random_blocks(24, seed=domain) if language else rows(domain)
        if method == "joint" and domain:  # the union
            from torch.utils.data import ConcatDataset

            data = random_blocks(48, seed=9) if language else ConcatDataset([rows(0), rows(1)])
        trainer = ContinualTrainer(
            model=model,
            args=arguments,
            method=method,
            train_dataset=data,
            processing_class=build_tokenizer() if language else None,
            domain=f"domain {domain}",
            remember=remember,
        )
        trainer.train(resume_from_checkpoint=newest_checkpoint(directory) if resume else None)
        return trainer

    def learn(self, directory, method_name: str, domains: int = 2, **options) -> tuple[nn.Module, object]:
        """Learn domains one after the other with one method object; gives the model and the method."""
        model, method = self.model(), METHODS[method_name]()
        for domain in range(domains):
            self.train(directory / str(domain), model, method, domain, **options)
        return model, method


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def set_gradient(method, vector):
    parameters = list(method.trainer.model.parameters())
    for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def random_like(vector, seed=0):
    return (
        torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed)) * vector.norm() / len(vector) ** 0.5
    )
