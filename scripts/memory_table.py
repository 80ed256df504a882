"""
Bytes per trained parameter that every method takes beside weights, gradient and optimizer, as a Markdown table:
``python scripts/memory_table.py``.

Measured on a model of twelve layers and one short row, so that activations are next to nothing beside parameters,
while a second domain is learned: what stays between two steps, the most within a step, and the most while the domain
is consolidated; and what stays with a LoRA adapter, per parameter of the adapter. Under FSDP2, which is not measured,
every process has an N-th of it, or the method is refused.
"""

from __future__ import annotations

import argparse
import weakref
from contextlib import redirect_stdout
from io import StringIO
from logging import getLogger
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM, TrainerCallback
from transformers.utils import logging

from das_lm import ContinualTrainer, DASConfig
from das_lm.data.built_in import MODELS
from das_lm.errors import UserError
from das_lm.methods import METHODS, Method
from das_lm.units import Units

#: Row of the table -> method and its arguments.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "`naive`, `joint`": ("naive", {}),
    "`das`, masks only": ("das", {"contrast_weight": 0.0}),
    "`das`, masks only, `soft_mask_target: gradient`": (
        "das",
        {"contrast_weight": 0.0, "soft_mask_target": "gradient"},
    ),
    "`das`": ("das", {}),
    "`spg`": ("spg", {}),
    "`spg`, `soft_mask_target: gradient`": ("spg", {"soft_mask_target": "gradient"}),
    "`l2`": ("l2", {}),
    "`ewc`": ("ewc", {}),
    "`ewc`, `ewc_mode: online`": ("ewc", {"ewc_mode": "online"}),
    "`mas`": ("mas", {}),
    "`si`": ("si", {}),
    "`rwalk`": ("rwalk", {"rwalk_interval": 1}),
    "`scp`": ("scp", {"scp_projections": 1}),
    "`agem`": ("agem", {}),
    "`gem`, one earlier domain": ("gem", {}),
    "`ncl`": ("ncl", {"optim": "sgd", "max_grad_norm": 0.0}),
    "`ncl`, `ncl_curvature: kronecker`": (
        "ncl",
        {"optim": "sgd", "max_grad_norm": 0.0, "ncl_curvature": "kronecker"},
    ),
    "`replay`": ("replay", {}),
    "`self_replay`": ("self_replay", {}),
    "`self_replay`, `self_replay_target: distributions`": ("self_replay", {"self_replay_target": "distributions"}),
    "`anchor`, a copy as teacher": ("anchor", {"anchor_teacher": "copy"}),
    "`anchor`, cached targets": ("anchor", {"anchor_teacher": "cached"}),
    "`lwf`": ("lwf", {}),
    "`gate`, `token_weighting: flow`": ("gate", {"token_weighting": "flow"}),
    "`pull_back`": ("pull_back", {}),
    "`interpolate`": ("interpolate", {}),
    "`ema`": ("ema", {}),
}
#: With an adapter: not the attention's output, whose columns are the heads' and cannot be masked one by one.
ADAPTED = r".*layer\.\d+\.(attention\.self\.(query|key|value)|intermediate\.dense|output\.dense)"
END = ("finish_weights", "end_domain")
STEP = ("read_gradient", "change_gradient", "before_step", "mask_step", "after_step")


class Live(TorchDispatchMode):
    """
    Counts the bytes of some storages, and of all that tensors are made in while it is on, as long as they are there.

    Args:
        storages: what there is already.
    """

    def __init__(self, storages: list[torch.UntypedStorage]):
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, Any] = {}
        for storage in storages:
            self._count(storage)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:  # no view
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self.known.pop(key, None)

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def storages(value: Any, seen: set[int]) -> list[torch.UntypedStorage]:
    """What the tensors are in that a method's attributes lead to, without those in `seen`."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        new = [] if storage._cdata in seen else [storage]
        seen.add(storage._cdata)
        return new
    if isinstance(value, nn.Module):
        return storages([*value.parameters(), *value.buffers()], seen)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return [storage for one in value for storage in storages(one, seen)]
    if isinstance(value, ContinualTrainer | Units) or id(value) in seen or not hasattr(value, "__dict__"):
        return []
    if type(value).__module__.startswith("das_lm."):
        seen.add(id(value))
        return storages(vars(value), seen)
    return []


class Watch(TrainerCallback):
    """Measures a method in the second of two steps, and when the domain ends."""

    def __init__(self, trainer: ContinualTrainer, method: Method):
        self.trainer, self.method = trainer, method
        self.between = self.step = self.end = 0
        for name in (*STEP, *END):
            setattr(method, name, self._measured(name, getattr(method, name)))

    def storages(self) -> tuple[list[torch.UntypedStorage], list[torch.UntypedStorage]]:
        """What the method holds, and the gradients."""
        seen: set[int] = set()
        storages(self.trainer.model, seen)
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        return storages(gradients, seen), storages(self.method, seen)

    def _measured(self, name: str, moment: Any) -> Any:
        def measured() -> None:
            gradients, held = self.storages()
            with Live([*gradients, *held]) as live:
                size = sum(storage.nbytes() for storage in gradients)
                del gradients, held
                moment()
            if name in END:
                self.end = max(self.end, live.most - size)
            elif self.trainer.state.global_step == 1:
                self.step = max(self.step, live.most - size)

        return measured

    def on_step_end(self, args, state, control, **kwargs):
        self.between = sum(storage.nbytes() for storage in self.storages()[1])


def measured(name: str, options: dict[str, Any], width: int, lora: bool) -> tuple[Watch, int]:
    """A method while it learns a second domain, and the number of trained parameters."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS["built-in"])
    torch.manual_seed(0)
    model = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=12,
            num_attention_heads=4,
            intermediate_size=4 * width,
            max_position_embeddings=16,
            type_vocab_size=1,
        )
    )
    blocks = Dataset.from_dict({"input_ids": [tokenizer("a b c d")["input_ids"]] * 4})
    method = METHODS[name]()
    for domain in ("first", "second"):
        with TemporaryDirectory() as directory:
            args = DASConfig(
                output_dir=directory,
                max_steps=2,
                max_length=8,
                per_device_train_batch_size=1,
                importance_samples=1,
                memory_size=1,
                use_cpu=True,
                disable_tqdm=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                **options,
            )
            trainer = ContinualTrainer(
                model,
                args,
                method,
                train_dataset=blocks,
                processing_class=tokenizer,
                domain=domain,
                peft_config=LoraConfig(r=64, target_modules=ADAPTED) if lora else None,
            )
            if domain == "second":
                watch = Watch(trainer, method)
                trainer.add_callback(watch)
            trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            trainer.train()
            if lora:
                model = trainer.model.merge_and_unload()
    return watch, trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=192, help="features of the model (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", help="methods, by name (default: all)")
    given = parser.parse_args()
    logging.set_verbosity_error()
    getLogger("das_lm").setLevel("ERROR")
    print("| method | stays | step | end | stays, LoRA | FSDP2 |\n| --- | --- | --- | --- | --- | --- |")
    for label, (name, options) in ROWS.items():
        if given.rows and name not in given.rows:
            continue
        with redirect_stdout(StringIO()):
            watch, trained = measured(name, options, given.width, lora=False)
            try:
                adapter, small = measured(name, options, given.width, lora=True)
                beside = f"{adapter.between / small:.1f}"
            except UserError:
                beside = "refused"
        figures = " | ".join(f"{number / trained:.1f}" for number in (watch.between, watch.step, watch.end))
        # The model, which a sharded one cannot be.
        is_copied = options.get("self_replay_target") == "distributions" or options.get("anchor_teacher") == "copy"
        sharded = "÷ N" if METHODS[name].works_sharded and not is_copied else "refused"
        print(f"| {label} | {figures} | {beside} | {sharded} |", flush=True)


if __name__ == "__main__":
    main()
