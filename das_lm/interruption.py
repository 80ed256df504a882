"""SIGTERM, Ctrl-C and lost processes: stop where nothing is lost, and say how to go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Self

import torch

from das_lm.errors import UserError

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
    While a block runs, SIGTERM and Ctrl-C raise [`Interrupted`]. With `postponed` the first one is only noted in
    `received`, for the block to stop where it suits; the second still raises.
    """

    def __init__(self):
        self.postponed = False
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and `&` set it
                    self._before[number] = signal.signal(number, self._receive) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self.postponed = False

    def stop(self) -> None:
        """No longer postponed: raise what was received, and what comes."""
        self.postponed = False
        if self.received is not None:
            raise Interrupted(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork, such as one that tokenizes: it ends when its parent says so
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.postponed and self.received is None:
            self.received, self._at = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":  # not print: the signal may have come in the middle of one
                os.write(2, b"\ndas-lm: stopping after this step; the same signal once more stops at once\n")
            return
        if self.postponed and "RANK" in os.environ and time.monotonic() < self._at + PASSED_ON:
            return
        raise Interrupted(number)


def is_about_processes(error: BaseException) -> bool:
    """Whether an error says that another process could not be reached: what gloo, NCCL and the store raise."""
    words = ("by peer", "gloo", "NCCL", "Broken pipe")
    known = getattr(torch.distributed, "DistError", ())
    return isinstance(error, known) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
