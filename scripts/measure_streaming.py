"""Peak memory of training on a stream, for generated text of several sizes.

Every size is written to a file, a tiny model trains a few steps on it, and then the stream is read to its end, block
by block, as training would. All of it in one process, the smallest size first, so that the peak is the process's so
far: it stays where it is if memory does not grow with the text.

    python scripts/measure_streaming.py --megabytes 10 100 1000
"""

import argparse
import random
import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from das_lm import ContinualTrainer, DASConfig
from das_lm.data.domains import Domain
from das_lm.data.masking import MLMMasking
from das_lm.data.streaming import SHUFFLE_BUFFER, TrainingStream

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WORDS = ["".join(random.Random(index).choices("abcdefghijklmnopqrstuvwxyz", k=9)) for index in range(1000)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token per word: the fastest there is, since time goes where the text is long, not where it is cut."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write_text(path: Path, megabytes: float) -> None:
    """Documents of some 2 kB, one per line, each with a number of its own."""
    draw = random.Random(0)
    pool = " ".join(draw.choices(WORDS, k=100_000))
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            start = draw.randrange(len(pool) - 4000)
            file.writelines(f"{draw.random()} {pool[start : start + draw.randrange(100, 4000)]}\n" for _ in range(100))


def measure(
    directory: Path, megabytes: float, max_length: int, shuffle_buffer: int
) -> tuple[int, float, float, float]:
    """Blocks of the text, seconds until the last of three steps, seconds for the rest, and the peak so far in MB."""
    path = directory / f"{megabytes:g}.txt"
    write_text(path, megabytes)
    started, tokenizer = time.perf_counter(), build_tokenizer()
    documents = Domain("generated", data=str(path), streaming=True).load().train
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), type_vocab_size=1, pad_token_id=1, **config))
    args = DASConfig(
        output_dir=str(directory / "output"),
        max_steps=3,
        max_length=max_length,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    masking = MLMMasking(tokenizer, args.mlm_probability)
    stream = TrainingStream(documents, tokenizer, max_length, masking, 0, "generated", shuffle_buffer)
    ContinualTrainer(model, args, "naive", stream, processing_class=tokenizer, domain="generated").train()
    trained = time.perf_counter()
    blocks = stream.available(sys.maxsize)
    read = time.perf_counter()
    path.unlink()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return blocks, trained - started, read - trained, peak


def main() -> None:
    """Print a row per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[10, 100, 1000], help="of text (10 100 1000)")
    parser.add_argument("--max_length", type=int, default=128, help="tokens of a block")
    parser.add_argument("--shuffle_buffer", type=int, default=SHUFFLE_BUFFER, help="blocks that are shuffled")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("text, MB", "blocks", "first 3 steps, s", "the rest, s", "peak so far, MB")
    with TemporaryDirectory() as directory:
        for megabytes in sorted(options.megabytes):
            blocks, first, rest, peak = measure(Path(directory), megabytes, options.max_length, options.shuffle_buffer)
            table.add_row(f"{megabytes:g}", f"{blocks:,}", f"{first:.1f}", f"{rest:.1f}", f"{peak:,.0f}")
            print(f"{megabytes:g} MB: {blocks} blocks, peak {peak:.0f} MB", file=sys.stderr, flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
