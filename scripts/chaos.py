"""Kill a run at random moments and resume it: ``python scripts/chaos.py --kills 20 --seed 0 --output output/chaos``.

A small recipe (built-in text and model) runs once without interruption. Then the same run is killed (SIGKILL) in every
phase: while it loads, measures, trains, passes over the blocks for importance, saves a checkpoint or a domain, goes
from one domain to the next, and draws the report. Kills take turns with faults: a Ctrl-C that ends the reader of the
output too instead of a SIGKILL; another text when the run is resumed, which must be refused; a clock that is set back;
two resumes at once, of which one must be refused. When the run ends, its weights, importance and result matrix must be
those of the uninterrupted run, bit for bit, and the same files must be there. If kills are left over, the next run is
their victim. After that, bad command lines of the fuzz test go through real processes: each must end in success, or
with one message and status 2 and no file changed. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import random
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from das_lm.data.built_in import documents
from das_lm.files import MANIFEST, is_partial
from das_lm.measure.results import FILE_NAME as RESULTS_NAME
from das_lm.measure.results import Results
from das_lm.run.directory import RECIPE_NAME

SCRIPT = Path(__file__).with_name("continual_pretrain.py")
RECIPE = shlex.split("""
    --recipe bio_then_cs --max_steps 9 --save_steps 3 --eval_steps 6 --logging_steps 1 --max_length 64
    --per_device_train_batch_size 8 --importance_samples 64 --report_to none
""")
PHASES = (
    "loading",
    "evaluation",
    "importance",
    "training",
    "saving a checkpoint",
    "saving a domain",
    "between domains",
    "report",
)
#: What happens beside a kill, in turns.
FAULTS = ("reader gone", "data swapped", "clock set back", "two starts", "none")
#: What a process says when a phase begins: lines, and progress bars with their labels.
MARKS = {
    r"importance \([^\r\n]*?100%[^\r\n]*?\[": "training",  # or saving, as the directories tell
    r"importance \([^\r\n]*?\[": "importance",
    r"(?:held-out text of|Evaluation)[^\r\n]*?\[": "evaluation",
    r"held-out loss of": "between domains",
    r"[\r\n] *\d+%\|[^\r\n]*?\[": "training",
    r"Results: ": "report",
}
MARK = re.compile("|".join(f"({mark})" for mark in MARKS))
TIMEOUT = 3600  # seconds; a run takes about a minute of one core
REFUSED = 2  # status


class Victim:
    """
    A run in a process of its own, and the phase that it is in.

    Args:
        options: of `das-lm pretrain`, without the output directory.
        output: that directory; a run in it is resumed.
    """

    def __init__(self, options: list[str], output: Path):
        self.output, self.said, self.text = output, "loading", collections.deque(maxlen=200)
        self.left = self._unfinished()  # by one that was killed before
        resume = ["--resume"] if (output / RECIPE_NAME).exists() else []
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *options, "--output_dir", str(output), *resume],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # One thread: sums in one order. Bars, though nobody looks: they say what goes on.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TTY_COMPATIBLE": "1"},
        )
        self.is_listening = True
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        recent = ""
        while self.is_listening:
            if not select.select([self.process.stdout], [], [], 0.1)[0]:
                continue
            chunk = os.read(self.process.stdout.fileno(), 65536).decode(errors="replace")
            if not chunk:
                break
            self.text.append(chunk)
            recent = (recent + chunk)[-1000:]
            for match in MARK.finditer(recent):
                self.said = list(MARKS.values())[match.lastindex - 1]

    def _unfinished(self) -> dict[Path, int]:
        """Directories that are being saved -> when they were written to."""
        found = [path for path in self.output.glob(".[0-9]*-*") if is_partial(path)]
        found += [path for path in self.output.glob("*.training/checkpoint-*") if not (path / MANIFEST).exists()]
        try:
            return {path: max(one.stat().st_mtime_ns for one in [path, *path.rglob("*")]) for path in found}
        except FileNotFoundError:  # renamed meanwhile
            return {}

    @property
    def phase(self) -> str:
        """What is on the disk tells more than what was said."""
        for path, time_written in self._unfinished().items():
            if self.left.get(path) != time_written:
                return "saving a domain" if is_partial(path) else "saving a checkpoint"
        return self.said

    def kill(self) -> str:
        """SIGKILL; returns the phase in which it came."""
        self.process.send_signal(signal.SIGKILL)
        self.wait()
        return self.phase  # nothing moves any more

    def interrupt(self) -> str:
        """Ctrl-C, which ends the reader of the output as well; returns the phase in which it came."""
        phase = self.phase
        self.is_listening = False
        self.reader.join()
        self.process.stdout.close()
        self.process.send_signal(signal.SIGINT)
        status = self.wait()
        if status not in (128 + signal.SIGINT, -signal.SIGINT, 0):  # before it can hear, or at its very end
            raise SystemExit(f"status {status} after Ctrl-C in {self.output}, {phase}:\n{self.said_last()}")
        return phase

    def wait(self) -> int:
        """Its status, when it has said all."""
        try:
            status = self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise SystemExit(f"a run hangs in {self.output}:\n{self.said_last()}") from None
        self.reader.join()
        return status

    def phases(self) -> collections.abc.Iterator[str]:
        """The phase, again and again, until the process ends."""
        deadline = time.monotonic() + TIMEOUT
        while self.process.poll() is None:
            yield self.phase
            time.sleep(0.003)
            if time.monotonic() > deadline:
                self.process.kill()
                raise SystemExit(f"a run hangs in {self.output}:\n{self.said_last()}")
        self.wait()
        if self.process.returncode != 0 and self.process.returncode != -signal.SIGKILL:
            raise SystemExit(f"status {self.process.returncode} in {self.output}:\n{self.said_last()}")

    def said_last(self) -> str:
        return "".join(self.text)[-3000:]


def start(options: list[str], output: Path, twice: bool = False) -> Victim:
    """A run that begins or goes on; of two that start at once, the one that may."""
    both = [Victim(options, output) for _ in range(1 + twice)]
    while twice and all(one.process.poll() is None for one in both):
        time.sleep(0.01)
    for refused in [one for one in both if one.process.poll() is not None][:twice]:
        if refused.wait() != REFUSED or "is in use by" not in refused.said_last():
            raise SystemExit(f"two starts in {output}: both run, or none\n{refused.said_last()}")
        both.remove(refused)
    return both[0]


def swap_text(options: list[str], output: Path, text: Path) -> list[str]:
    """Resume a run with another text; what is wrong with how that ends. Nothing, if it has not read it yet."""
    if not (output / RESULTS_NAME).exists():
        return []
    lines = text.read_text().splitlines(keepends=True)
    text.write_text("".join(lines[1:]))
    other = Victim(options, output)
    status = other.wait()
    text.write_text("".join(lines))
    is_refused = status == REFUSED and "is not what the run began with" in other.said_last()
    return [] if is_refused else [f"{output.name}: other text is not refused\n{other.said_last()}"]


def set_clock_back(output: Path) -> None:
    """What was written is of tomorrow."""
    tomorrow = time.time() + 24 * 3600
    for path in output.rglob("*"):
        os.utime(path, (tomorrow, tomorrow))


def run_whole(options: list[str], output: Path, twice: bool = False) -> dict[str, list[float]]:
    """Run without interruption; returns the seconds of every phase, occurrence by occurrence."""
    spans, now, since = collections.defaultdict(list), None, 0.0
    for phase in itertools.chain(start(options, output, twice).phases(), [None]):
        if phase != now:
            if now:
                spans[now].append(time.monotonic() - since)
            now, since = phase, time.monotonic()
    return spans


def kill_once(
    options: list[str],
    output: Path,
    phase: str,
    occurrence: int,
    delay: float,
    twice: bool = False,
    end: Callable[[Victim], str] = Victim.kill,
) -> str | None:
    """Go on with a run, and end it a moment after a phase has begun for the n-th time; returns the phase in which it
    died, or `None` if it came to its end before."""
    victim, before, seen, deadline = start(options, output, twice), None, 0, None
    for now in victim.phases():
        seen += now == phase != before
        before = now
        if deadline is None and seen == occurrence:
            deadline = time.monotonic() + delay
        if deadline is not None and time.monotonic() >= deadline:
            return end(victim)
    return None


def where(output: Path) -> str:
    """What a run goes on from."""
    checkpoints = [path.parent for path in output.glob(f"*.training/checkpoint-*/{MANIFEST}")]
    for stage in sorted(path for path in output.glob("[0-9]*-*.training")):
        if not stage.with_suffix("").exists():
            steps = [int(path.name.partition("-")[2]) for path in checkpoints if path.parent == stage]
            if steps:
                return f"{stage.with_suffix('').name}, step {max(steps)}"
    finished = sorted(path.name for path in output.glob("[0-9]*-*") if path.suffix != ".training")
    return finished[-1] if finished else "base model" if (output / RESULTS_NAME).exists() else "nothing"


def differences(whole: Path, other: Path) -> list[str]:
    """What of two finished runs is not the same."""
    found = []
    names, others = ({str(path.relative_to(one)) for path in one.rglob("*")} for one in (whole, other))
    found += [f"{name} is in one of them" for name in sorted(names ^ others)]
    for path in sorted(whole.glob("[0-9]*-*/*.safetensors")):
        name = path.relative_to(whole)
        if str(name) not in others:
            continue
        left, right = load_file(path), load_file(other / name)
        if left.keys() != right.keys():
            found.append(f"{name}: other tensors")
        found += [f"{name}: {key}" for key in left.keys() & right.keys() if not torch.equal(left[key], right[key])]
    left, right = ([(row["name"], row["scores"]) for row in Results.load(one).stages] for one in (whole, other))
    if left != right:
        found.append(f"{RESULTS_NAME}: the result matrix")
    return found


def finish(options: list[str], whole: Path, output: Path, console: Console, twice: bool = False) -> list[str]:
    """Let a victim come to its end; what differs from the uninterrupted run."""
    if not (output / "report.html").exists():
        run_whole(options, output, twice)
    found = [f"{output.name}: {difference}" for difference in differences(whole, output)]
    console.print(f"{output.name} has ended:", "other results" if found else "the same results, bit for bit")
    return found


def bad_command_lines(count: int, draw: random.Random, place: Path) -> list[str]:
    """Run the command lines of the fuzz test as a person would; what is wrong with how they end."""
    sys.path.insert(0, str(SCRIPT.parents[1]))
    from tests.fuzz.harness import World
    from tests.fuzz.mutations import bad_command

    world, found = World(place), []
    for _ in range(count):
        arguments, before = bad_command(draw), world.files()
        command = [str(Path(sys.executable).with_name("das-lm")), *arguments]
        try:
            result = subprocess.run(command, cwd=world.root, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:  # a good one, which has begun
            world.clean()
            continue
        wrong = []
        if result.returncode not in (0, 1, 2) or "Traceback" in result.stderr:
            wrong.append(f"status {result.returncode}")
        if result.returncode == 2 and result.stderr.count("das-lm: error: ") != 1:
            wrong.append("not one message")
        if result.returncode == 2 and world.files() != before:
            wrong.append("changed files")
        if wrong:
            found.append(f"das-lm {shlex.join(arguments)}: {', '.join(wrong)}\n{result.stderr[-2000:]}")
        world.clean()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="How often at least (default: %(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Of phases and moments (default: %(default)s).")
    parser.add_argument("--output", type=Path, default=Path("output/chaos"), help="A new directory.")
    parser.add_argument("--bad", type=int, default=20, help="Bad command lines (default: %(default)s).")
    parser.add_argument("options", nargs="*", help="Of das-lm pretrain, after --; instead of the small recipe.")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists; name a new directory")
    draw, console = random.Random(options.seed), Console(highlight=False)
    text, recipe = options.output / "bio.jsonl", options.options
    options.output.mkdir(parents=True)
    if not recipe:
        text.write_text("".join(json.dumps({"text": one["text"]}) + "\n" for one in documents("bio", "train")))
        recipe = [*RECIPE, "--domain", f"bio={text}", "cs=built-in"]

    started = time.monotonic()
    whole = options.output / "whole"
    spans = run_whole(recipe, whole)
    console.print(f"uninterrupted: {time.monotonic() - started:.0f} s")
    console.print(*(f"  {phase}: {len(one)} × {sum(one) / len(one):.2f} s" for phase, one in spans.items()), sep="\n")

    # Every phase in turn, in a random order, until there were enough kills, and one at least in every phase.
    table = Table("kill", "victim", "aimed at", "after", "died in", "goes on from", "fault", box=None)
    died_in: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    victims, kills, attempts, twice = 1, 0, 0, False
    while (kills < options.kills or set(spans) - set(died_in)) and attempts < 3 * options.kills + 20:
        attempts += 1
        missing = sorted(set(spans) - set(died_in)) if kills >= options.kills else sorted(spans)
        phase = draw.choice([one for one in missing if died_in[one] == min(died_in[other] for other in missing)])
        occurrence = draw.randint(1, min(3, len(spans[phase])))
        delay = draw.uniform(0, spans[phase][occurrence - 1])
        output = options.output / f"victim-{victims}"
        fault = FAULTS[kills % len(FAULTS)]
        end = Victim.interrupt if fault == "reader gone" else Victim.kill
        found, twice = kill_once(recipe, output, phase, occurrence, delay, twice, end), False
        if found is None:
            wrong += finish(recipe, whole, output, console)
            victims += 1
            continue
        kills += 1
        died_in[found] += 1
        row = [str(kills), str(victims), phase, f"{occurrence}. time + {delay:.2f} s", found, where(output), fault]
        table.add_row(*row)
        console.print("killed:", "  ".join(row), soft_wrap=True)
        if fault == "data swapped" and text.exists():
            wrong += swap_text(recipe, output, text)
        if fault == "clock set back":
            set_clock_back(output)
        twice = fault == "two starts"
    wrong += finish(recipe, whole, options.output / f"victim-{victims}", console, twice)
    console.print(table)
    console.print(*(f"{phase}: {died_in[phase]} kills" for phase in PHASES), sep="\n")
    wrong += [f"no kill in phase '{phase}'" for phase in PHASES if not died_in[phase]]

    wrong += bad_command_lines(options.bad, draw, options.output / "bad")
    console.print(f"{options.bad} bad command lines; all in {(time.monotonic() - started) / 60:.0f} min")
    console.print(*(wrong or [f"{kills} kills, {victims} victims: all equal, bit for bit"]), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
