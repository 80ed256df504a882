"""
Speed and memory of a training step and of the importance pass, as ratios against the plain Hugging Face Trainer in the
same run: the configurations take turns, round after round, on one model, and the medians are compared. Peak memory is
that of two steps in a process of its own.

    python scripts/benchmark.py --rounds 5
    python scripts/benchmark.py --rounds 5 --causal --vocabulary 151936
    python scripts/benchmark.py --rounds 5 --steps 9 --only naive anchor
    python scripts/benchmark.py --rounds 9 --per_example
    python scripts/benchmark.py --rounds 5 --writing

The third takes the configurations with one of these words in their names. The next measures the per-example squares of
gradients (the Fisher of EWC) against a plain forward and backward pass of the same batch and against a loop over its
examples; the last the tokens per second of text that a model writes of itself, against `generate` with the same batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    TrainerCallback,
)
from transformers import TrainingArguments as PlainArguments

from das_lm import ContinualTrainer, DASConfig, DASTrainer
from das_lm.classic import MLP
from das_lm.data.blocks import TrainingBlocks
from das_lm.data.built_in import BASE_MODEL, MODELS
from das_lm.data.collating import PaddingCollator
from das_lm.data.masking import IGNORED, MLMMasking, NextTokens
from das_lm.data.packing import start_token
from das_lm.methods.per_example import PerExample
from das_lm.methods.writing import Writer
from das_lm.model.objective import LanguageModeling
from das_lm.training.cpu import keep_freed_memory
from das_lm.units import Units
from das_lm.units.importance import Importance

CONFIGURATIONS = {
    "naive": {"method": "naive"},
    "soft masks only": {"contrast_weight": 0.0},
    "DAS": {},
    "DAS, no gradient through the prior view": {"contrast_prior_gradient": False},
    "anchor, a copy as teacher": {"method": "anchor", "anchor_teacher": "copy"},
    "anchor, cached targets": {"method": "anchor", "anchor_teacher": "cached"},
}
CAUSAL_CONFIGURATIONS = {
    "soft masks only, loss in chunks": {"contrast_weight": 0.0, "chunked_cross_entropy": True},
    "DAS, loss in chunks": {"chunked_cross_entropy": True},
}


class StepClock(TrainerCallback):
    """Wall-clock seconds of every optimizer step but the first."""

    def __init__(self):
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        _synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        _synchronize()
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self._start)


class PeakMemory:
    """Peak resident memory (CPU) or allocated memory (GPU) in bytes while the context is open."""

    def __enter__(self) -> PeakMemory:
        self.peak, self._done = 0, threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.02):
            self.peak = max(self.peak, process.memory_info().rss)

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often every configuration is timed")
    parser.add_argument("--steps", type=int, default=3, help="steps per round, the first of which is not counted")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=164, help="tokens per block")
    parser.add_argument("--layers", type=int, default=12, help="of a model otherwise shaped like roberta-base")
    parser.add_argument("--causal", action="store_true", help="a model shaped like gpt2 instead")
    parser.add_argument("--vocabulary", type=int, default=50265, help="tokens that the model knows")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="configurations with such a word, and no importance")
    parser.add_argument("--json", help="write the measurements to this file")
    parser.add_argument("--per_example", action="store_true", help="measure per-example gradients, nothing else")
    parser.add_argument("--writing", action="store_true", help="measure text that a model writes, nothing else")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)  # print the peak memory of one configuration, no more
    return parser.parse_args()


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    special = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    words = [*special.values(), *(f"w{index}" for index in range(vocabulary - len(special)))]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), model_max_length=512, **special)


def main() -> None:
    """Measure, print a table, and write the JSON file that was asked for."""
    options = _arguments()
    torch.set_num_threads(os.cpu_count())
    keep_freed_memory()  # as the trainer does, so that the plain one has it too
    torch.manual_seed(0)
    if options.per_example:
        return per_example(options.rounds)
    if options.writing:
        return writing(options.rounds, options.length)
    tokenizer, shape = _tokenizer(options.vocabulary), {"vocab_size": options.vocabulary}
    configurations = dict(CONFIGURATIONS)
    if options.causal:
        model = GPT2LMHeadModel(GPT2Config(**shape, n_layer=options.layers))
        labeling = NextTokens()  # plain training shifts once more: the same work on other labels
        configurations |= CAUSAL_CONFIGURATIONS
    else:
        shape |= {"max_position_embeddings": 514, "type_vocab_size": 1, "num_hidden_layers": options.layers}
        model = RobertaForMaskedLM(RobertaConfig(**shape))
        labeling = MLMMasking(tokenizer, 0.15)
    rows = np.random.default_rng(0).integers(
        5, options.vocabulary, (options.batch_size * max(options.steps, 4), options.length)
    )
    blocks = TrainingBlocks({"bench": Dataset.from_dict({"input_ids": rows.tolist()})}, labeling, seed=0)

    with tempfile.TemporaryDirectory() as directory:
        common = {
            "output_dir": directory,
            "per_device_train_batch_size": options.batch_size,
            "max_steps": options.steps,
            "bf16": options.bf16,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "learning_rate": 1e-6,
        }

        def plain() -> Trainer:
            arguments = PlainArguments(**common)
            return Trainer(model, arguments, train_dataset=blocks, data_collator=PaddingCollator(tokenizer))

        def das(method: str = "das", **changes) -> DASTrainer:
            remember = blocks.domains["bench"].select(range(options.batch_size)) if method == "anchor" else None
            arguments = DASConfig(
                **common, max_length=options.length, importance_samples=options.batch_size * 4, **changes
            )
            trainer = DASTrainer(
                model,
                arguments,
                train_dataset=blocks,
                processing_class=tokenizer,
                method=method,
                remember=remember,
            )
            if method == "das":
                trainer.add_callback(Untouched(trainer))
            return trainer

        makers = {"plain Trainer": plain, **{name: (lambda c=c: das(**c)) for name, c in configurations.items()}}
        if options.only:
            words = ("plain Trainer", *options.only)
            makers = {name: make for name, make in makers.items() if any(word in name for word in words)}
        if options.peak_of:
            trainer = makers[options.peak_of]()
            with PeakMemory() as memory:
                trainer.train()
            print(memory.peak)
            return
        peaks = {name: _peak_in_own_process(name) for name in makers}
        steps: dict[str, list[float]] = {name: [] for name in makers}
        passes: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for name, make in makers.items():
                clock, trainer = StepClock(), make()
                trainer.add_callback(clock)
                trainer.train()
                steps[name].append(statistics.median(clock.seconds))
                del trainer
                model.zero_grad(set_to_none=True)
            if not options.only:
                method = das().methods[0]
                for name, measure, views in (
                    ("importance pass, gradient", method._domain_importance, 1),
                    ("importance pass, proxy (per row)", method._proxy_importance, 2),
                ):
                    start = time.perf_counter()
                    measure()
                    _synchronize()
                    passes.setdefault(name, []).append((time.perf_counter() - start) / 4 / views)
            print(".", end="", flush=True)
    print()
    _report(options, steps, passes, peaks)


def writing(rounds: int, length: int) -> None:
    """Print the tokens per second that the built-in causal model writes, and those of `generate`."""
    model = AutoModelForCausalLM.from_pretrained(MODELS["built-in-causal"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS["built-in-causal"])
    batch = torch.full((Writer.batch_size, 1), start_token(tokenizer))
    seconds: dict[str, list[float]] = {"written": [], "generate": []}
    with tempfile.TemporaryDirectory() as directory:
        arguments = DASConfig(directory, max_length=length, report_to="none", disable_tqdm=True)
        writer = Writer(ContinualTrainer(model, arguments, processing_class=tokenizer))
        for number in range(rounds):
            for way in seconds:
                start = time.perf_counter()
                if way == "written":
                    writer.rows(len(batch), number)
                else:
                    with torch.no_grad():
                        model.generate(
                            batch.to(model.device),
                            attention_mask=torch.ones_like(batch, device=model.device),
                            do_sample=True,
                            top_k=0,
                            min_new_tokens=length,
                            max_new_tokens=length,
                        )
                _synchronize()
                seconds[way].append(time.perf_counter() - start)
    rate = {way: batch.shape[0] * length / statistics.median(one) for way, one in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    print(
        f"{len(batch)} rows of {length} tokens at once, {torch.get_num_threads()} threads, median of {rounds} rounds: "
        f"{rate['written']:,.0f} tokens per second, generate {rate['generate']:,.0f} "
        f"({rate['written'] / rate['generate']:.2f}x; rounds {min(ratios):.2f} to {max(ratios):.2f})"
    )


def per_example(rounds: int) -> None:
    """Print the seconds of a plain forward and backward pass, of the per-example squares, and of a loop over examples:
    of the MLP of permuted MNIST with 256 images, and of the built-in language model with 16 × 128 tokens."""
    mlp = MLP([784, 1024, 512, 256], 10)
    images, labels = torch.rand(256, 784), torch.randint(10, (256,))

    def mlp_losses(rows: slice) -> torch.Tensor:
        return F.cross_entropy(mlp(images[rows])["logits"], labels[rows], reduction="none")

    lm = AutoModelForMaskedLM.from_pretrained(BASE_MODEL).float().eval()
    objective = LanguageModeling(Units(lm), causal=False)
    tokens = torch.randint(5, lm.config.vocab_size, (16, 128))
    predicted = torch.rand(16, 128) < 0.15
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": torch.where(predicted, tokens, IGNORED),
    }

    def lm_losses(rows: slice) -> torch.Tensor:
        part = {name: value[rows] for name, value in batch.items()}
        return objective(lm, part).row_sums(len(part["labels"]))

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {rounds} rounds, ms (× plain)")
    cases = (
        ("MLP 784-1024-512-256-10, 256 rows", mlp, mlp_losses, 256, None),
        ("built-in language model, 16 x 128 tokens", lm, lm_losses, 16, objective.flattened(batch)),
    )
    for name, model, losses, count, flattened in cases:
        gradients = PerExample(model)
        gradients.add(count, lambda f=losses: f(slice(None)), flattened)  # the first one also compares with autograd

        def plain(model=model, losses=losses) -> None:
            losses(slice(None)).mean().backward()
            model.zero_grad(set_to_none=True)

        def vectorised(gradients=gradients, losses=losses, count=count, flattened=flattened) -> None:
            gradients.add(count, lambda: losses(slice(None)), flattened)

        def loop(model=model, losses=losses, count=count) -> None:
            parameters = list(model.parameters())
            sums = [torch.zeros_like(parameter) for parameter in parameters]
            for row in range(count):
                loss = losses(slice(row, row + 1)).sum()
                for total, gradient in zip(
                    sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
                ):
                    if gradient is not None:
                        total.addcmul_(gradient, gradient)

        seconds: dict[str, list[float]] = {"plain": [], "per example": [], "loop": []}
        for _ in range(rounds):
            for way, run in zip(seconds, (plain, vectorised, loop), strict=True):
                start = time.perf_counter()
                run()
                seconds[way].append(time.perf_counter() - start)
        medians = {way: statistics.median(values) for way, values in seconds.items()}
        figures = "   ".join(f"{way} {1e3 * m:.1f} ({m / medians['plain']:.2f}x)" for way, m in medians.items())
        print(f"{name}:   {figures}   loop / per example {medians['loop'] / medians['per example']:.1f}x")


def _peak_in_own_process(name: str) -> int:
    """Peak memory in bytes of two steps of a configuration, with nothing left over from another."""
    command = [sys.executable, __file__, *sys.argv[1:], "--steps", "2", "--peak_of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


class Untouched(TrainerCallback):
    """Gives DAS a random importance, so that `train` times steps alone, without the importance passes."""

    def __init__(self, trainer: DASTrainer):
        method = trainer.methods[0]
        method.importance = Importance("paper")
        generator = torch.Generator().manual_seed(0)
        raw = {key: torch.rand(size, generator=generator) for key, size in trainer.units.sizes.items()}
        method.importance.accumulate("random", {key: value.to(trainer.args.device) for key, value in raw.items()})
        method.end_domain = lambda: None


def _report(options: argparse.Namespace, steps: dict, passes: dict, peaks: dict) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}, batch {options.batch_size} x {options.length} tokens, "
          f"{options.layers} layers, {options.vocabulary} tokens known, "
          f"{options.rounds} rounds of {options.steps - 1} timed steps")  # fmt: skip
    reference = steps["plain Trainer"]
    results = {}
    print(f"{'':<42}{'seconds':>9}{'ratio':>8}{'rounds':>16}{'peak GiB':>10}")
    for name, seconds in {**steps, **passes}.items():
        ratios = [one / base for one, base in zip(seconds, reference, strict=True)]
        ratio = statistics.median(seconds) / statistics.median(reference)
        peak = f"{peaks[name] / 2**30:10.2f}" if name in peaks else ""
        print(f"{name:<42}{statistics.median(seconds):9.3f}{ratio:8.3f}{min(ratios):8.2f} –{max(ratios):6.2f}{peak}")
        results[name] = {"seconds": seconds, "ratio": ratio, "peak_bytes": peaks.get(name)}
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": device, "options": vars(options), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
