"""
Speed and memory against the plain Hugging Face Trainer in the same run, in about nine minutes on two cores.

    python scripts/benchmark.py                          # a step of every configuration, importance
    python scripts/benchmark.py --causal --only naive masks
    python scripts/benchmark.py --only anchor naive --rounds 20
    python scripts/benchmark.py --memory                 # peak memory, each in a process of its own
    python scripts/benchmark.py per_example              # squares of per-example gradients
    python scripts/benchmark.py writing                  # text that a model writes, against `generate`
    python scripts/benchmark.py text                     # reading, tokenising and packing, MB per second
    python scripts/benchmark.py start                    # until `import das_lm` and `das-lm --help` answer

Every configuration trains a copy of one model in a thread of its own, and they take their steps in turn, one each per
round, in an order that is drawn anew: what slows the machine slows all of a round alike, and nobody always follows the
same one, whose traces in caches and memory cost time. A step is all that the Trainer does from one batch to the next.
The ratio is the median over rounds of a configuration's seconds by the reference's in the same round, with the
95 % interval of that median; beside it the ratio of the floating-point operations of a step. The first round warms up
and is not counted. How many remembered rows of the anchor come with a batch is chance: its operations are not counted.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import scipy.stats
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    TrainerCallback,
)
from transformers import TrainingArguments as PlainArguments

from das_lm import ContinualConfig, ContinualTrainer, Domain
from das_lm.classic import MLP
from das_lm.data.blocks import TrainingBlocks
from das_lm.data.built_in import BASE_MODEL, MODELS
from das_lm.data.collating import PaddingCollator
from das_lm.data.masking import IGNORED, MLMMasking, NextTokens
from das_lm.data.packing import pack, start_token
from das_lm.files import write_json
from das_lm.methods import DAS
from das_lm.methods.per_example import PerExample
from das_lm.methods.writing import Writer
from das_lm.model.objective import LanguageModeling
from das_lm.training.cpu import keep_freed_memory
from das_lm.units import Units
from das_lm.units.importance import Importance

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "naive": {"method": "naive"},
    "soft masks only": {"contrast_weight": 0.0},
    "DAS": {},
    "DAS, no gradient through the prior view": {"contrast_prior_gradient": False},
    "anchor, a copy as teacher": {"method": "anchor", "anchor_teacher": "copy"},
    "anchor, cached targets": {"method": "anchor", "anchor_teacher": "cached"},
    "naive, LoRA": {"method": "naive", "lora": True},
    "anchor, LoRA": {"method": "anchor", "lora": True},
}
CAUSAL_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "soft masks only, loss in chunks": {"contrast_weight": 0.0, "chunked_cross_entropy": True},
    "DAS, loss in chunks": {"chunked_cross_entropy": True},
}
M_ARENA_MAX = -8  # of malloc.h
MEGABYTES = 8  # of text that is tokenised


class Stepper(TrainerCallback):
    """A training run in a thread of its own, which takes one step whenever it is called."""

    def __init__(self, trainer: Trainer):
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._counter = FlopCounterMode(display=False)
        self.flops = 0
        trainer.add_callback(self)
        trainer.remove_callback(PrinterCallback)
        self._thread = threading.Thread(target=self._train, args=(trainer,), daemon=True)
        self._thread.start()
        self._wait()  # until the first step

    def __call__(self) -> None:
        self._go.release()
        self._wait()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def _train(self, trainer: Trainer) -> None:
        try:
            trainer.train()
            _synchronize()
        except BaseException as error:  # raised where the step was asked for
            self._error = error
        self._done.release()

    def on_step_begin(self, args, state, control, **kwargs):
        _synchronize()
        self._done.release()
        self._go.acquire()
        if state.global_step == 0:
            self._counter.__enter__()  # of this thread

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self._counter.__exit__(None, None, None)
            self.flops = self._counter.get_total_flops()


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
    parser.add_argument("what", nargs="?", choices=["steps", *OTHERS], default="steps")
    parser.add_argument("--rounds", type=int, default=8, help="how often every configuration is timed")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=164, help="tokens per block")
    parser.add_argument("--layers", type=int, default=12, help="of a model otherwise shaped like roberta-base")
    parser.add_argument("--causal", action="store_true", help="a model of the same size with the blocks of llama")
    parser.add_argument("--vocabulary", type=int, default=50265, help="tokens that the model knows")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="plain training, and what is named so")
    parser.add_argument("--memory", action="store_true", help="peak memory of three steps instead of time")
    parser.add_argument("--json", help="write the measurements to this file")
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


class Bench:
    """The configurations of one model, by name, as trainers that are made when they are asked for."""

    def __init__(self, options: argparse.Namespace, directory: str):
        self.options, self.tokenizer = options, _tokenizer(options.vocabulary)
        shape = {"vocab_size": options.vocabulary, "num_hidden_layers": options.layers}
        if options.causal:
            self.model = LlamaForCausalLM(
                LlamaConfig(
                    **shape,
                    hidden_size=768,
                    intermediate_size=2048,
                    num_attention_heads=12,
                    max_position_embeddings=514,
                    attention_dropout=0.1,
                    pad_token_id=1,
                )
            )
            labeling = NextTokens()  # plain training shifts once more: the same work on other labels
        else:
            self.model = RobertaForMaskedLM(RobertaConfig(**shape, max_position_embeddings=514, type_vocab_size=1))
            labeling = MLMMasking(self.tokenizer, 0.15)
        count = options.batch_size * (options.rounds + 2)
        rows = np.random.default_rng(0).integers(5, options.vocabulary, (count, options.length))
        self.blocks = TrainingBlocks({"bench": Dataset.from_dict({"input_ids": rows.tolist()})}, labeling, seed=0)
        self.common = {
            "output_dir": directory,
            "per_device_train_batch_size": options.batch_size,
            "max_steps": options.rounds + 2,  # the last is not taken: with it the domain ends
            "bf16": options.bf16,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "learning_rate": 1e-6,
        }
        configurations = CONFIGURATIONS | (CAUSAL_CONFIGURATIONS if options.causal else {})
        self.makers = {"plain Trainer": self.plain}
        self.makers |= {name: partial(self.continual, **given) for name, given in configurations.items()}
        if options.only:
            words = ("plain Trainer", *options.only)
            self.makers = {name: make for name, make in self.makers.items() if any(word in name for word in words)}

    def plain(self) -> Trainer:
        return Trainer(
            copy.deepcopy(self.model),
            PlainArguments(**self.common),
            train_dataset=self.blocks,
            data_collator=PaddingCollator(self.tokenizer),
        )

    def continual(self, method: str = "das", lora: bool = False, **given: Any) -> ContinualTrainer:
        options = self.options
        names = ["q_proj", "v_proj"] if options.causal else ["query", "value"]
        trainer = ContinualTrainer(
            copy.deepcopy(self.model),
            ContinualConfig(**self.common, max_length=options.length, importance_samples=options.batch_size, **given),
            method,
            self.blocks,
            processing_class=self.tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=names) if lora else None,
            remember=self.blocks.domains["bench"].select(range(options.batch_size)) if method == "anchor" else None,
        )
        if method == "das":
            self._with_random_importance(trainer.methods[0], trainer)
        return trainer

    @staticmethod
    def _with_random_importance(das: DAS, trainer: ContinualTrainer) -> None:
        """So that training times steps alone, without the importance passes."""
        das.importance = Importance("paper")
        generator = torch.Generator().manual_seed(0)
        raw = {key: torch.rand(size, generator=generator) for key, size in trainer.units.sizes.items()}
        das.importance.accumulate("random", {key: value.to(trainer.args.device) for key, value in raw.items()})
        das.end_domain = lambda: None


def main() -> None:
    """Measure, print a table, and write the JSON file that was asked for."""
    options = _arguments()
    torch.set_num_threads(os.cpu_count())
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # threads take turns: what one has freed is for all
    keep_freed_memory()  # as the trainer does, so that the plain one has it too
    torch.manual_seed(0)
    if options.what != "steps":
        return OTHERS[options.what](options)
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(options, directory)
        if options.peak_of:
            trainer = bench.makers[options.peak_of]()
            with PeakMemory() as memory:
                trainer.train()
            return print(memory.peak)
        measure = _memory if options.memory else _steps
        results = measure(options, bench)
    if options.json:
        asked = {name: value for name, value in vars(options).items() if name not in ("json", "peak_of")}
        write_json(options.json, {"device": _device(), "options": asked, "results": results})


def _steps(options: argparse.Namespace, bench: Bench) -> dict[str, dict[str, Any]]:
    """Time every configuration and the importance passes, in turn."""
    turns: dict[str, Callable[[], Any]] = {name: Stepper(make()) for name, make in bench.makers.items()}
    if not options.only:
        method = bench.continual().methods[0]
        turns["importance pass, gradient"] = method._domain_importance
        turns["importance pass, proxy (two views)"] = method._proxy_importance
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in tqdm(range(options.rounds + 1), desc="rounds"):
        for name, turn in random.Random(number).sample(list(turns.items()), len(turns)):
            start = time.perf_counter()
            turn()
            _synchronize()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    print(
        f"{_device()}, torch {torch.__version__}, batch {options.batch_size} x {options.length} tokens, "
        f"{options.layers} layers, {options.vocabulary} tokens known, {options.rounds} rounds\n"
        f"{'':<42}{'seconds':>9}{'of plain':>10}{'interval':>14}{'operations':>12}  {'of naive'}"
    )
    counted = {name: turn for name, turn in turns.items() if isinstance(turn, Stepper) and "anchor" not in name}
    flops = {name: turn.flops for name, turn in counted.items()}
    results: dict[str, dict[str, Any]] = {}
    for name, ours in seconds.items():
        naive = "naive, LoRA" if "LoRA" in name else "naive"
        one = results[name] = {"seconds": ours, "of_plain": _ratio(ours, seconds["plain Trainer"])}
        if name in flops:
            one["operations_of_plain"] = flops[name] / flops["plain Trainer"]
        if "anchor" in name and naive in seconds:
            one["of_naive"] = _ratio(ours, seconds[naive])
        middle, low, high = one["of_plain"].values()
        line = f"{name:<42}{statistics.median(ours):9.3f}{middle:10.2f}{f'{low:.2f} – {high:.2f}':>14}"
        line += f"{one['operations_of_plain']:12.2f}" if name in flops else f"{'':12}"
        if "of_naive" in one:
            middle, low, high = one["of_naive"].values()
            line += f"  {middle:.2f} ({low:.2f} – {high:.2f})"
        print(line)
    return results


def _ratio(ours: list[float], reference: list[float]) -> dict[str, float]:
    """The median over rounds of a quotient of seconds, and its 95 % interval (order statistics; no normality)."""
    quotients = np.array(ours) / np.array(reference)
    interval = scipy.stats.quantile_test(quotients, q=float(np.median(quotients)), p=0.5).confidence_interval()
    low, high = (
        float(bound) if np.isfinite(bound) else float(extreme)
        for bound, extreme in zip(interval, (quotients.min(), quotients.max()), strict=True)
    )
    return {"median": float(np.median(quotients)), "low": low, "high": high}


def _memory(options: argparse.Namespace, bench: Bench) -> dict[str, dict[str, Any]]:
    """Peak memory of a short run of every configuration."""
    peaks = {name: _peak_in_own_process(name) for name in tqdm(bench.makers, desc="configurations")}
    print(f"{_device()}, batch {options.batch_size} x {options.length} tokens, {options.layers} layers")
    for name, peak in peaks.items():
        print(f"{name:<42}{peak / 2**30:8.2f} GiB{peak / peaks['plain Trainer']:8.2f}")
    return {name: {"peak_bytes": peak} for name, peak in peaks.items()}


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def writing(options: argparse.Namespace) -> None:
    """Print the tokens per second that the built-in causal model writes, and those of `generate`."""
    rounds, length = options.rounds, options.length
    model = AutoModelForCausalLM.from_pretrained(MODELS["built-in-causal"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS["built-in-causal"])
    batch = torch.full((Writer.batch_size, 1), start_token(tokenizer))
    seconds: dict[str, list[float]] = {"written": [], "generate": []}
    with tempfile.TemporaryDirectory() as directory:
        arguments = ContinualConfig(directory, max_length=length, report_to="none", disable_tqdm=True)
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


def per_example(options: argparse.Namespace) -> None:
    """Print the seconds of a plain forward and backward pass, of the per-example squares, and of a loop over examples:
    of the MLP of permuted MNIST with 256 images, and of the built-in language model with 16 × 128 tokens."""
    rounds = options.rounds
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
    """Peak memory in bytes of three steps of a configuration, with nothing left over from another."""
    command = [sys.executable, __file__, *sys.argv[1:], "--rounds", "1", "--peak_of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def text(options: argparse.Namespace) -> None:
    """Print the MB of text per second that are read and split, and tokenised and packed, from a JSON Lines file."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS["built-in-causal"])
    documents = Domain("bio").load().train["text"]
    with tempfile.TemporaryDirectory() as directory:
        path, size = Path(directory) / "text.jsonl", 0
        with path.open("w", encoding="utf-8") as file:
            for number in itertools.count():
                document = f"{number} {documents[number % len(documents)]}"
                file.write(json.dumps({"text": document}) + "\n")
                size += len(document.encode())
                if size >= MEGABYTES * 1e6:
                    break
        start = time.perf_counter()
        loaded = Domain("bench", str(path)).load()
        read = time.perf_counter()
        pack(loaded.train, tokenizer, options.length)
        packed = time.perf_counter()
    print(
        f"{size / 1e6:.1f} MB of text: read and split at {size / 1e6 / (read - start):.1f} MB/s, tokenised and packed "
        f"at {size / 1e6 / (packed - read):.1f} MB/s, together {size / 1e6 / (packed - start):.1f} MB/s"
    )


def start(options: argparse.Namespace) -> None:
    """Print the seconds until Python, torch and das_lm are imported, and until `das-lm --help` is printed."""
    commands = {
        "python": ["-c", ""],
        "import torch": ["-c", "import torch"],
        "import das_lm": ["-c", "import das_lm"],
        "das-lm --help": ["-m", "das_lm", "--help"],
    }
    for name, command in commands.items():
        seconds = []
        for _ in range(options.rounds):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
        print(f"{name:<20}{statistics.median(seconds):6.2f} s")


OTHERS = {"per_example": per_example, "writing": writing, "text": text, "start": start}


if __name__ == "__main__":
    main()
