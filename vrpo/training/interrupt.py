"""SIGTERM, or one Ctrl-C: the running step is finished, a checkpoint saved, and training left.

transformers' own callback for enable_jit_checkpoint also saves before the optimizer step, where the random
state is that of half a step, and lets each process choose its step: a resumed run is then another one, or the
processes wait for each other for ever.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_PRESS = 1.0  # seconds: a launcher passes on the Ctrl-C that the terminal sent to every process already


class TrainingInterrupted(SystemExit):
    """Training was stopped by a signal after saving; exit code 128 + signum: 143 (SIGTERM), 130 (SIGINT)."""

    def __init__(self, signum: int, checkpoint: str):
        super().__init__(128 + signum)
        self.signum, self.checkpoint = signum, checkpoint

    def __str__(self) -> str:
        return (
            f"stopped by {signal.Signals(self.signum).name}; {self.checkpoint} is whole, go on from it with "
            "resume_from_checkpoint=true"
        )


def ends_epoch(args, state) -> bool:
    """Whether an epoch ends with this step, or is broken off, and something is logged or evaluated then."""
    if IntervalStrategy.EPOCH not in (args.logging_strategy, args.eval_strategy):
        return False
    return state.global_step >= state.max_steps or state.epoch == int(state.epoch or 0)


class SaveAfterEpochEnd(TrainerCallback):
    """A checkpoint due at the last step of an epoch holds what is logged and evaluated at its end, too.

    A run that goes on from it begins with the next epoch, and would leave that out.
    """

    def __init__(self):
        self._is_due = False

    def on_step_end(self, args, state, control, **kwargs):
        self._is_due = control.should_save and ends_epoch(args, state)
        if self._is_due:
            control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._is_due:
            self._is_due, control.should_save = False, True


class StopOnSignal(TrainerCallback):
    """Knows whether a signal asked to stop, and all processes the same: `is_due` after a step or an epoch."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.is_due = False
        self.signum = 0  # the signal that all processes know of
        self._came = 0  # the one that came to this process
        self._since = 0.0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Takes the signals while training; those that the caller handles itself stay with the caller."""
        self.is_due, self.signum, self._came = False, 0, 0
        before = {}
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                    before[signum] = signal.signal(signum, self._handle)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _handle(self, signum, frame) -> None:
        if not self._came:
            self._came, self._since = signum, time.monotonic()
            if self.accelerator.is_main_process:
                # Not through a logger: the signal may have come in the middle of what that writes.
                name = signal.Signals(signum).name
                os.write(2, f"{name}: saving after this step; Ctrl-C stops at once\n".encode())
        elif signum == signal.SIGINT and time.monotonic() - self._since > _ONE_PRESS:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        self.signum = self._came
        if self.accelerator.num_processes > 1:  # all must save at the same step
            came = torch.tensor([self._came], device=self.accelerator.device)
            self.signum = int(self.accelerator.gather(came).max())
        self.is_due = bool(self.signum) and not ends_epoch(args, state)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.is_due = bool(self.signum)
