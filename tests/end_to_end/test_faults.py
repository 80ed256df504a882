"""A run that is stopped at any moment loses nothing: faults at named points, kills, signals, full disks, damage."""

import io
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import datasets
import pytest
from tqdm import tqdm

from das_lm import ContinualTrainer, DASConfig
from das_lm.cli import main
from das_lm.data.domains import Domain
from das_lm.errors import UserError
from das_lm.files import broken_file
from das_lm.measure.cache import Cache
from das_lm.measure.results import Results
from das_lm.methods import DAS
from das_lm.run import directory as run_directory
from das_lm.run import walk as pretrain
from das_lm.run.directory import locked
from das_lm.signals import Interrupted, Signals, check_signals
from das_lm.training import checkpoints
from tests.end_to_end.helpers import command, finish, stop_at
from tests.helpers import build_tokenizer, load_script, random_blocks, run_recipe, signal_at_step, tiny_roberta


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard():
    """A shell that starts the tests in the background leaves it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ---- faults at named points --------------------------------------------------------------------------------------


#: Name -> where a run ends: object, function, its n-th call, and whether it ends before or after that.
POINTS: dict[str, tuple[Any, str, int, str]] = {
    "nothing is written": (run_directory, "write_text", 1, "before"),
    "nothing but the recipe is written": (run_directory, "write_text", 1, "after"),
    "the base model is measured in part": (Cache, "put", 2, "after"),
    "importance of what is known": (ContinualTrainer, "importance_batches", 1, "before"),
    "a step": (ContinualTrainer, "training_step", 4, "before"),
    "a checkpoint has no importance": (DAS, "save", 2, "before"),
    "a checkpoint has no random state": (ContinualTrainer, "_save_rng_state", 2, "before"),
    "a checkpoint has no manifest": (checkpoints, "seal", 2, "before"),
    "a checkpoint is whole": (checkpoints, "seal", 2, "after"),
    "importance of the domain": (ContinualTrainer, "importance_batches", 2, "before"),
    "the domain has no manifest": (pretrain, "seal", 1, "before"),
    "the domain has no name": (pretrain, "seal", 1, "after"),
    "the domain is not measured": (ContinualTrainer, "measure", 2, "before"),
    "the domain is measured in part": (Cache, "put", 5, "after"),
    "the domain has a card": (pretrain, "write_card", 1, "after"),
    "between two domains": (Results, "save", 2, "after"),
    "a step of the second domain": (ContinualTrainer, "training_step", 9, "before"),
    "the results are not written": (Results, "save", 3, "before"),
    "the end": (Results, "save", 3, "after"),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_fault_at_a_named_point_costs_nothing(world, finished, tmp_path, monkeypatch, point):
    stop_at(world, tmp_path / "run", monkeypatch, POINTS[point])
    finish(world, tmp_path / "run", finished)


def test_what_was_being_written_is_no_run_and_goes(world, finished, tmp_path):
    """A real kill leaves temporary files, which no `finally` has removed."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.yaml.123.partial").write_text("model_na")
    finish(world, tmp_path / "run", finished)
    for name in (".forgetting.json.123.partial", "measured/.a.safetensors.123.partial"):
        (tmp_path / "run" / name).write_text("{")
    finish(world, tmp_path / "run", finished)


# ---- real kills --------------------------------------------------------------------------------------------------


def test_three_real_kills_of_one_run(world, tmp_path):
    """SIGKILL while a checkpoint is saved, in an importance pass, and when a domain has been measured. Every run is a
    process of its own, the one that is not killed, too."""
    chaos, output = load_script("chaos"), tmp_path / "run"
    shown = ["--disable_tqdm", "false"]
    alike = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "check": True, "timeout": 300}
    subprocess.run(command(world, tmp_path / "whole", *shown), **alike)
    died_in = [
        chaos.kill_once(["--recipe", str(world / "recipe.yaml"), *shown], output, phase, occurrence, delay=0)
        for phase, occurrence in (("saving a checkpoint", 2), ("importance", 1), ("between domains", 1))
    ]
    assert None not in died_in and "saving a checkpoint" in died_in
    subprocess.run(command(world, output, *shown, "--resume"), **alike)
    assert chaos.differences(tmp_path / "whole", output) == []


# ---- two at once -------------------------------------------------------------------------------------------------


def test_one_process_at_a_time_writes_to_a_directory(world, finished, tmp_path, capsys):
    output, names = tmp_path / "run", {path.name for path in finished.iterdir()}
    shutil.copytree(finished, output)
    with locked(output):
        for options in ("--resume", "--overwrite_output_dir"):
            assert run_recipe(world, output, options) == 2
            error = capsys.readouterr().err
            assert (
                f"{output} is in use by process {os.getpid()} on {socket.gethostname()}; wait until it ends" in error
            )
        assert main(["evaluate", "--run", str(output)]) == 2
        assert "is in use by" in capsys.readouterr().err
        assert main(["evaluate", "--run", str(output), "--output_dir", str(tmp_path / "other")]) == 0
    assert run_recipe(world, output, "--resume") == 0
    assert {path.name for path in output.iterdir()} == names  # and no lock


def test_a_lock_ends_with_its_process_and_leaves_no_directory(tmp_path):
    """A fork of it, such as one that loads data, lives on."""
    with pytest.raises(UserError, match="x"), locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        raise UserError("x")
    assert not list(tmp_path.iterdir())
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            if (fork := os.fork()) != 0:
                os.write(theirs, str(fork).encode())
            signal.pause()
    fork = int(os.read(ours, 100))
    with pytest.raises(UserError, match=f"in use by process {child} on "), locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path):
        os.kill(fork, signal.SIGKILL)
    assert not list(tmp_path.iterdir())


# ---- other text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, part", [("bio", "training"), ("cs", "training"), ("cs", "held-out"), ("old", "held-out")]
)
def test_a_run_goes_on_with_the_text_that_it_began_with(world, finished, tmp_path, capsys, name, part):
    """One document of a domain, learned or not yet, is another one; of the same size, and no newer."""
    output, path = tmp_path / "run", world / f"{name}.txt"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "2-cs")
    text, status = path.read_text(), path.stat()
    lines = text.splitlines()
    held_out = set(Domain(name, str(path)).load().held_out["text"])
    at = next(i for i, line in enumerate(lines) if (line in held_out or name == "old") == (part == "held-out"))
    try:
        lines[at] = " ".join(reversed(lines[at].split()))
        path.write_text("\n".join(lines))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert run_recipe(world, output, "--resume") == 2
        error = capsys.readouterr().err
        assert "das-lm: error: --resume: the " in error
        assert f"text of domain '{name}' is not what the run began with; put it back" in error
        shutil.copytree(finished / "2-cs", output / "2-cs")
        shutil.copy(finished / "forgetting.json", output)
        if part == "held-out":
            assert main(["evaluate", "--run", str(output)]) == 2
            assert "the held-out text of domain" in capsys.readouterr().err
        shutil.rmtree(output / "2-cs")
    finally:
        path.write_text(text)
    finish(world, output, finished)


# ---- SIGTERM and Ctrl-C ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(world, finished, tmp_path, monkeypatch, capfd, number, status):
    output, before = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at_step(patch, number, step=3)
        assert run_recipe(world, output) == status
    assert signal.getsignal(number) is before
    saved = output / "1-bio.training" / "checkpoint-3"  # where none was due
    assert broken_file(saved) is None
    said = capfd.readouterr().err
    assert f"das-lm: interrupted; 'bio' is saved as {saved}; the same command with --resume continues" in said
    assert "Traceback" not in said
    finish(world, output, finished)


def test_the_second_signal_stops_at_once(world, finished, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.SIGINT, step=3, times=2)
        assert run_recipe(world, tmp_path / "run") == 130
    assert not (tmp_path / "run" / "1-bio.training" / "checkpoint-3").exists()
    assert "das-lm: interrupted; the same command with --resume continues" in capfd.readouterr().err
    finish(world, tmp_path / "run", finished)


def test_a_launcher_that_passes_ctrl_c_on_is_no_second_signal(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Signals() as signals:
        signals.postponed = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        monkeypatch.setattr("das_lm.signals.PASSED_ON", 0.0)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("where, name", [(DAS, "end_domain"), (ContinualTrainer, "measure"), (pretrain, "_save")])
def test_a_signal_where_nothing_is_learned_stops_at_once(world, finished, tmp_path, monkeypatch, where, name):
    original = getattr(where, name)

    def wrapper(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, wrapper)
        assert run_recipe(world, tmp_path / "run") == 143
    finish(world, tmp_path / "run", finished)


class _InDestructor:
    """Python drops what a signal handler raises here."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def _in_callback():
    class Nothing:
        pass

    weakref.finalize(Nothing(), os.kill, os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("moment", [_InDestructor, _in_callback])
@pytest.mark.parametrize("where, name", [(pretrain, "_save"), (pretrain.Walk, "record"), (DAS, "begin_domain")])
def test_a_signal_that_python_drops_is_heard_later(world, finished, tmp_path, monkeypatch, moment, where, name):
    original = getattr(where, name)

    def wrapper(*arguments, **options):
        result = original(*arguments, **options)
        moment()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(where, name, wrapper)
        assert run_recipe(world, tmp_path / "run") == 143
    assert not (tmp_path / "run" / "2-cs").exists()
    finish(world, tmp_path / "run", finished)


def test_a_signal_in_a_destructor_shows_no_traceback(capfd):
    with pytest.raises(Interrupted), Signals():
        _InDestructor()
        assert "Traceback" not in capfd.readouterr().err
        check_signals()


def test_ctrl_c_ends_the_reader_of_a_pipe_too(world, finished, tmp_path):
    """`2>&1 | tee log`: neither the handler, nor progress bars, nor the last message find a reader."""
    with pytest.MonkeyPatch.context() as patch:
        before = [os.dup(number) for number in (1, 2)]
        listens, speaks = os.pipe()
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(speaks, number)
            patch.setattr("sys." + name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), write_through=True))
        os.close(speaks)

        original = ContinualTrainer.training_step

        def training_step(self, *arguments):
            if self.state.global_step == 2:
                os.close(listens)
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, *arguments)

        patch.setattr(ContinualTrainer, "training_step", training_step)
        shown = ["--disable_tqdm", "false"]
        try:
            status = run_recipe(world, tmp_path / "run", *shown)
        finally:
            for number, copy in zip((1, 2), before, strict=True):
                os.dup2(copy, number)
                os.close(copy)
    assert status == 130
    assert broken_file(tmp_path / "run" / "1-bio.training" / "checkpoint-3") is None
    finish(world, tmp_path / "run", finished, *shown)


def test_without_a_reader_a_command_goes_on():
    """`… | head`: what is left to say is dropped, and the status is the command's own."""
    command = [sys.executable, "-c", "from das_lm.cli import main; exit(main(['recipes']))"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == ""


@pytest.mark.parametrize("signalled", [False, True])
def test_a_killed_worker_of_the_data_loader(world, finished, tmp_path, monkeypatch, capsys, signalled):
    """On its own it is a message; where a signal went to all processes of the job, that is what ends the run."""
    original, workers = ContinualTrainer.training_step, ["--dataloader_num_workers", "1"]

    def training_step(self, *arguments):
        if self.state.global_step == 3:
            (worker, *_) = multiprocessing.active_children()
            if signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(worker.pid, signal.SIGTERM if signalled else signal.SIGKILL)
            worker.join()
            time.sleep(0.1)  # SIGCHLD
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ContinualTrainer, "training_step", training_step)
        assert run_recipe(world, tmp_path / "run", *workers) == (143 if signalled else 2)
    error = capsys.readouterr().err
    assert "Traceback" not in error and "--resume" in error
    assert ("dataloader_num_workers: a worker" in error) != signalled
    finish(world, tmp_path / "run", finished, *workers)
    for bar in (tqdm, datasets.utils.tqdm):
        assert isinstance(bar.get_lock(), type(threading.RLock()))  # no other process can have died with it


def test_a_trainer_of_its_own_saves_too(tmp_path, monkeypatch):
    """From Python it is an exception; without checkpoints nothing is caught."""
    for strategy, saved in (("steps", ["checkpoint-2"]), ("no", [])):
        args = DASConfig(
            tmp_path / strategy,
            max_length=12,
            max_steps=4,
            save_steps=100,
            save_strategy=strategy,
            use_cpu=True,
            report_to="none",
        )
        one = ContinualTrainer(
            tiny_roberta(), args, train_dataset=random_blocks(40), processing_class=build_tokenizer(), domain="bio"
        )
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as raised:
            signal_at_step(patch, signal.SIGINT, step=2)
            one.train()
        assert [path.name for path in tmp_path.glob(f"{strategy}/*")] == saved
        assert isinstance(raised.value, Interrupted) == bool(saved)


def test_ignored_signals_stay_ignored_and_forks_end():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    finally:
        signal.signal(signal.SIGINT, before)
