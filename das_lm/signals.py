"""SIGTERM, Ctrl-C, lost processes and lost readers: stop where nothing is lost, and say how to go on."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from types import FrameType
from typing import Any, ClassVar, Self

from das_lm.errors import UserError, speaks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Seconds within which a launcher passes on the Ctrl-C that its processes had from the terminal themselves.
PASSED_ON = 1.0


class Interrupted(KeyboardInterrupt):
    """
    SIGTERM or Ctrl-C has ended a run.

    Args:
        number: of the signal; the command line exits with status 128 + number.
        saved: what was saved before, in words.
    """

    def __init__(self, number: int, saved: str = ""):
        super().__init__(f"interrupted; {saved}" if saved else "interrupted")
        self.number = number


class ProcessLost(UserError):
    """Another process of the run has ended. It may be the one that speaks, so every process says this."""

    everywhere = True


class Signals:
    """
    While a block runs, SIGTERM and Ctrl-C are noted in `received` and raise [`Interrupted`]. Where Python would drop
    it, in a destructor or another callback of its own, [`check_signals`] raises it later. With `postponed` the first
    signal is only noted, for the block to stop where it suits; the second still raises.
    """

    _innermost: ClassVar[Signals | None] = None

    def __init__(self):
        self.postponed = False
        self.received: int | None = None
        self._before: dict[int, object] = {}
        self._output = ExitStack()

    def __enter__(self) -> Self:
        check_signals()
        self._process = os.getpid()
        self._outer, Signals._innermost = Signals._innermost, self
        self._output.enter_context(readers_may_go())
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and `&` set it
                    self._before[number] = signal.signal(number, self._receive) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self._output.close()
        self.postponed = False
        if self._outer:
            self._outer.received = self._outer.received or self.received
        Signals._innermost = self._outer

    def stop(self) -> None:
        """No longer postponed: raise what was received, and what comes."""
        self.postponed = False
        check_signals()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork, such as one that tokenizes: it ends when its parent says so
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        is_first = self.received is None
        if is_first:
            self.received, self._at = number, time.monotonic()
        if self.postponed:
            if is_first and speaks():
                with suppress(OSError):  # not print: the signal may have come in the middle of one
                    os.write(2, b"\ndas-lm: stopping after this step; the same signal once more stops at once\n")
            if is_first or ("RANK" in os.environ and time.monotonic() < self._at + PASSED_ON):
                return
        if not _is_in_destructor(frame):
            raise Interrupted(number)


def check_signals() -> None:
    """Raise the `Interrupted` that Python has dropped, if there is one. Called in every step and batch."""
    signals = Signals._innermost
    if signals is not None and not signals.postponed and signals.received is not None:
        raise Interrupted(signals.received)


def _is_in_destructor(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


@contextmanager
def readers_may_go() -> Iterator[None]:
    """
    Drop what stdout and stderr say into a pipe that nobody reads any more. Ctrl-C ends the `tee` of `… | tee log` too,
    and an error would then end a step in its middle.
    """
    with redirect_stdout(_listened(sys.stdout)), redirect_stderr(_listened(sys.stderr)):
        yield


def _listened(stream: Any) -> Any:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # none, or one that is no file
        return stream
    is_pipe = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
    return _ToReader(stream) if is_pipe and not isinstance(stream, _ToReader) else stream


class _ToReader:
    """A text stream into a pipe; it leads nowhere once the reader has gone."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._or_nowhere():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_nowhere():
            self._stream.flush()

    @contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except (BrokenPipeError, ConnectionResetError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def is_about_workers(error: BaseException) -> bool:
    """Whether an error says that a worker of a data loader was killed."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def is_about_processes(error: BaseException) -> bool:
    """Whether an error says that another process could not be reached: what gloo, NCCL and the store raise."""
    words = ("by peer", "gloo", "NCCL", "Broken pipe")
    import torch  # not for every command

    known = getattr(torch.distributed, "DistError", ())
    return isinstance(error, known) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
