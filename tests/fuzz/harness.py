"""A world of small files, and what every case is held to: success, or one message and status 2; no file changed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

from das_lm.cli import main
from tests.helpers import build_tokenizer, tiny_roberta

RECIPE = """\
description: A tiny run
model_name_or_path: model
output_dir: unused
domains:
  - name: bio
    data: bio.txt
    column: text
    held_out: 0.2
    min_characters: 5
    max_documents: 50
    training: {max_steps: 1}
measure:
  - name: general
    data: [general.jsonl]
method: [das, ewc]
schedule: sequential
training:
  max_length: 24
  max_steps: 1
  per_device_train_batch_size: 4
  importance_samples: 4
  learning_rate: 1.0e-3
  soft_mask_units: [head, output]
  disable_tqdm: true
  use_cpu: true
  report_to: none
"""


class Begun(Exception):
    """Training would begin: the input is good."""


@contextlib.contextmanager
def nothing_trains() -> Iterator[None]:
    """Whatever would train raises [`Begun`]; figures are drawn, and not saved."""
    with contextlib.ExitStack() as stack:
        for name in (
            "das_lm.training.trainer.ContinualTrainer.train",
            "das_lm.classic.benchmark.learn_all",
            "das_lm.classic.search.trial.Trial.measure",
            "das_lm.run.evaluate.fine_tune",
        ):
            stack.enter_context(mock.patch(name, side_effect=Begun))
        stack.enter_context(mock.patch("das_lm.report.drawing.Drawing.save"))  # slow; drawn they are
        yield


class World:
    """
    A directory with `recipe.yaml`, its text and model, `run/` (das and ewc, one domain), `classic/` (a benchmark), and
    `search/` (a λ search that has just begun).

    Args:
        place: an empty directory; the world lies two levels below it, so that `../../x` is still in it.
    """

    def __init__(self, place: Path):
        self.place, self.root = place, place / "a" / "b"
        self.root.mkdir(parents=True)
        tiny_roberta().save_pretrained(self.root / "model")
        build_tokenizer().save_pretrained(self.root / "model")
        draw = random.Random(0)
        lines = [" ".join(f"w{draw.randrange(59)}" for _ in range(12)) for _ in range(40)]
        (self.root / "bio.txt").write_text("\n".join(lines[:25]) + "\n", encoding="utf-8")
        rows = "".join(json.dumps({"text": line}) + "\n" for line in lines[25:])
        (self.root / "general.jsonl").write_text(rows, encoding="utf-8")
        (self.root / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        with contextlib.chdir(self.root), contextlib.redirect_stdout(io.StringIO()):
            assert main(["pretrain", "--recipe", "recipe.yaml", "--output_dir", "run"]) == 0
            options = "--method naive ewc --seeds 0 --epochs 1 --no-search --workers 1 --output_dir classic"
            assert main(["classic", "--experiment", "split", *options.split()]) == 0
            with nothing_trains(), contextlib.suppress(Begun):
                search = "search-lambda --experiment split --method ewc --high 10 --output_dir search"
                main(search.split())
        line = {"trial": 0, "lambda": 0.0, "measure": 1.5}
        (self.root / "search" / "evaluations.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
        self.kept = self.files()

    def files(self) -> dict[Path, str]:
        """Every path below -> a hash of its content."""
        return {
            path: "" if path.is_dir() else hashlib.blake2b(path.read_bytes()).hexdigest()
            for path in sorted(self.place.rglob("*"))
        }

    def clean(self) -> None:
        """Remove whatever is new."""
        for path in set(self.place.rglob("*")) - set(self.kept):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def check(self, arguments: Sequence[str], changes: Sequence[str] = ()) -> int:
        """
        Run a command here, and hold it to what is promised.

        Args:
            arguments: the command line without `das-lm`.
            changes: names here whose content it may change if it succeeds.

        Returns:
            its exit status; what it said on stderr is `message`.
        """
        before = self.files()
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors=how) for how in ("strict", "backslashreplace"))
        with (
            contextlib.chdir(self.root),
            mock.patch.dict(os.environ),
            nothing_trains(),
            seconds(60),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                status = main(list(arguments))
            except Begun:
                status = 0
            except SystemExit as stop:  # --help
                status = stop.code
        out.flush(), err.flush()
        message = self.message = err.buffer.getvalue().decode()
        after = self.files()
        self.clean()
        assert status in (0, 2) or (status == 1 and "--strict" in arguments), (status, message)
        assert "Traceback" not in message
        changed = {path for path in before if after.get(path) != before[path]}
        new = set(after) - set(before)
        if status == 2:
            assert message.startswith("das-lm: error: ") and message.count("das-lm: error: ") == 1, message
            assert len(message) < 20_000, f"a message of {len(message)} characters"
            new = {path for path in new if "measured" not in path.parts and path.name != "out"}  # what holds anyway
            assert not changed and not new, (message, changed, new)
        else:
            allowed = {self.root / name for name in changes}
            assert all(allowed & {path, *path.parents} for path in changed), changed
        return status


@contextlib.contextmanager
def seconds(limit: int) -> Iterator[None]:
    """Fail after so many seconds of work (not of waiting for a core): what never ends is a bug too."""

    def stop(*_):
        raise AssertionError(f"longer than {limit} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
