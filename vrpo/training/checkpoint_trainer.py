"""CheckpointTrainer: checkpoints that are whole or not there, with all that a run needs to go on as it was.

transformers' `_save_checkpoint` writes into `_get_output_dir()/checkpoint-N`, file by file, in place. Here
`_get_output_dir()` is another folder while it writes (vrpo.training.checkpoints), and what it does last, to
rotate and to push, is done when the checkpoint has its name. So whatever it writes, for whichever engine,
stays its business.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vrpo import disk
from vrpo.training.checkpoints import (
    checkpoints,
    checksums,
    discard,
    fault_of,
    incomplete,
    names_of,
    publish,
    remove_incomplete,
    rotate,
)
from vrpo.training.early_stopping import GoOnWaiting
from vrpo.training.interrupt import SaveAfterEpochEnd, StopOnSignal, TrainingInterrupted
from vrpo.training.packed_trainer import PackedTrainer

UNLOGGED = "vrpo_unlogged.json"


class CheckpointTrainer(PackedTrainer):
    """What the trainers do beyond transformers.Trainer when they save, and when they are told to stop."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._written_in: Path | None = None
        self._unlogged: dict[str, Any] | None = None
        self._saved_step: int | None = None
        training_args = kwargs["args"]
        # Ours, below, takes the place of transformers' callback of that name.
        wanted, training_args.enable_jit_checkpoint = training_args.enable_jit_checkpoint, False
        try:
            super().__init__(*args, **kwargs)
        finally:
            training_args.enable_jit_checkpoint = wanted
        self._stop = StopOnSignal(self.accelerator)
        self.add_callback(self._stop)
        self.add_callback(SaveAfterEpochEnd())
        self._early_stopping = GoOnWaiting(lambda: self.callback_handler.callbacks)
        self.add_callback(self._early_stopping)

    @contextlib.contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """SIGTERM or SIGINT leaves what is inside with TrainingInterrupted, once a checkpoint is saved."""
        self._saved_step = None
        wanted = self.args.enable_jit_checkpoint and self.args.save_strategy != "no"
        with self._stop.installed() if wanted else contextlib.nullcontext():
            try:
                yield
            except TrainingInterrupted:  # loggers and progress bars are to be closed all the same
                self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
                raise

    # ---- saving ----

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._written_in is None else str(self._written_in)

    def _final_name(self, folder: str) -> str:
        """Where a folder that is being written will be, to tell a person."""
        if self._written_in is None:
            return folder
        return str(self._written_in.parent / Path(folder).name)

    @contextlib.contextmanager
    def _writing_in(self, folder: Path) -> Iterator[None]:
        self._written_in = folder
        try:
            yield
        finally:
            self._written_in = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside = incomplete(run_dir) / folder.name
        if self.args.should_save:
            remove_incomplete(run_dir)
        self.accelerator.wait_for_everyone()
        try:
            with self._writing_in(aside.parent):
                super()._save_checkpoint(model, trial)
            self._name_best(run_dir)
            if self.args.should_save:
                self.state.save_to_json(os.path.join(aside, "trainer_state.json"))
            self._save_extras(str(aside))
            self._publish(aside, folder)
        except Exception as error:
            remove_incomplete(run_dir)  # a full disk gets its room back
            if not disk.is_of_writing(error):
                raise
            raise OSError(_cannot_save(folder, error)) from error
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run_dir, limit=self.args.save_total_limit, current=self.state.global_step, best=best)
        self._saved_step = self.state.global_step

    def _name_best(self, run_dir: Path) -> None:
        """The path of the best checkpoint, as it will be."""
        best = self.state.best_global_step
        if not best or self.args.save_strategy == "no":
            return
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{best}"
        if best == self.state.global_step or folder.exists():
            self.state.best_model_checkpoint = str(folder)

    def _save_extras(self, folder: str) -> None:
        """Hook: writes what else belongs to the checkpoint before it becomes visible; in every process.

        A subclass calls super()._save_extras(folder) and writes its own files; the manifest covers them.
        """
        unlogged = gather_object([self._state_of_log()])
        if self.args.should_save:
            told = {"last_logged_step": self._globalstep_last_logged, "processes": unlogged}
            Path(folder, UNLOGGED).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    def _load_extras(self, checkpoint: str | None) -> None:
        """Hook: reads what `_save_extras` wrote, before training goes on; None where it begins."""
        self._read_log(checkpoint)

    def _publish(self, aside: Path, folder: Path) -> None:
        """Gives the checkpoint that all processes wrote its name, first in the process that leads the run."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process and aside.exists():
            disk.sync_files(aside)
        self.accelerator.wait_for_everyone()
        known = self._checksums(aside)
        if self.accelerator.is_main_process:
            publish(aside, folder, known)
        self.accelerator.wait_for_everyone()
        if self.args.should_save and aside.exists():  # save_on_each_node, on a disk of its own
            publish(aside, folder, known)

    def _checksums(self, folder: Path) -> dict[str, str]:
        """Of a checkpoint's files by name, for the processes that write; all of them share the reading."""
        args = self.args
        if args.world_size == 1 or args.save_on_each_node:
            return checksums(folder, names_of(folder)) if args.should_save else {}
        names: list[Any] = [names_of(folder) if args.process_index == 0 else None]
        broadcast_object_list(names)
        mine = checksums(folder, names[0][args.process_index :: args.world_size])
        # What another node does not see is left to the caller.
        return {name: value for one in gather_object([mine]) for name, value in one.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A model beside the checkpoints is written aside, too, and appears file by file, each whole."""
        if self._written_in is not None or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        aside = incomplete(folder) / "model"
        try:
            with disk.writing(aside, f"the model could not be written to {folder}"):
                super()._save(str(aside), state_dict)
                disk.move_files(aside, folder)
        finally:
            with contextlib.suppress(OSError):
                aside.parent.rmdir()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._written_in is None:  # else the upload, which goes on beside training, would lose its files
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial, *args: Any, **kwargs: Any) -> Any:
        """With save_total_limit=1 the Trainer deletes all but the best at the end; here `discard` does."""
        run_dir = self._get_output_dir(trial)
        with self._writing_in(incomplete(run_dir)):
            output = super()._finalize_training(trial, *args, **kwargs)
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            for folder in checkpoints(run_dir):
                if not folder.samefile(best):
                    discard(folder)
        return output

    # ---- going on, and stopping ----

    def _fault_of(self, folder: Path) -> str | None:
        """What keeps the run from going on from a checkpoint: whole for each process that has a copy.

        The same in all processes, which call it together.
        """
        told = functools.partial(
            fault_of,
            folder,
            save_only_model=self.args.save_only_model,
            is_plain=not (self.is_fsdp_enabled or self.is_deepspeed_enabled),
        )

        def first_of_all(checksum: Callable[[Path], str] | None) -> str | None:
            every = gather_object([told(checksum=checksum) if self.args.should_save else None])
            return next((fault for fault in every if fault is not None), None)

        if fault := first_of_all(None):  # before all is read
            return fault
        known = self._checksums(folder)
        return first_of_all(
            lambda path: known.get(path.relative_to(folder).as_posix()) or disk.checksum(path)
        )

    @contextlib.contextmanager
    def _evaluating_at_start_once(self, checkpoint: str | None) -> Iterator[None]:
        """eval_on_start is of the start: a run that goes on has that evaluation in its log already."""
        wanted = self.args.eval_on_start
        self.args.eval_on_start = wanted and checkpoint is None
        try:
            yield
        finally:
            self.args.eval_on_start = wanted

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._unlogged is not None:
            self._restore_log(self._unlogged)
            self._unlogged = None
        if self.state.global_step >= self.state.max_steps or self._early_stopping.is_over:
            # Resumed at its end, in the middle of an epoch: the Trainer would take one more step.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if not self._stop.is_due:
            return
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        raise TrainingInterrupted(self._stop.signum, str(folder))

    # ---- what was not logged yet ----

    def _state_of_log(self) -> dict[str, Any]:
        """This process's sums since the last log line; without them a resumed run's next means differ."""
        sums = {name: float(value) for name, value in self._sums["train"].items()}
        return {"loss": float(self._tr_loss), "sums": sums}

    def _read_log(self, checkpoint: str | None) -> None:
        path = None if checkpoint is None else Path(checkpoint, UNLOGGED)
        known = path is not None and path.is_file()
        self._unlogged = json.loads(path.read_text(encoding="utf-8")) if known else None

    def _restore_log(self, told: dict[str, Any]) -> None:
        every = told["processes"]
        if len(every) == self.args.world_size:
            mine = every[self.args.process_index]
        else:  # the loss is averaged over processes and the sums are added up
            loss = sum(one["loss"] for one in every) / len(every)
            names = {name for one in every for name in one["sums"]}
            sums = {name: sum(one["sums"].get(name, 0.0) for one in every) for name in names}
            mine = {"loss": loss, "sums": sums if self.args.process_index == 0 else dict.fromkeys(names, 0.0)}
        self._globalstep_last_logged = told["last_logged_step"]
        self._tr_loss += mine["loss"]
        self._total_loss_scalar -= mine["loss"]  # train_loss is of this call of train()
        self._sums["train"].update(mine["sums"])


def _cannot_save(folder: Path, error: Exception) -> str:
    found = checkpoints(folder.parent)
    left = f"the last checkpoint is {found[0]}" if found else f"{folder.parent} holds no checkpoint yet"
    return (
        f"the checkpoint {folder.name} could not be written: {disk.reason_of(error)}. Training stopped and "
        f"removed what was written of it; {left}. Make room (save_total_limit keeps fewer) or mend the disk, "
        "then go on with resume_from_checkpoint=true"
    )
