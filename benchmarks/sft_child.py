"""One side of `python -m benchmarks sft`: the quickstart's trainers at one revision, some steps on request.

Requests and answers are lines of JSON. The trainer runs as `train()` runs it; between two blocks of steps a
callback waits for the next request. Parts are timed by wrapping the functions that do them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

HARNESS = Path(__file__).resolve().parents[1]
START = """
import sys
sys.path.insert(0, sys.argv[1])
import examples, vrpo, vrpo_kernels
sys.path.insert(0, sys.argv[2])
from benchmarks.sft_child import serve
serve(sys.argv[3], int(sys.argv[4]))
"""
PARTS = ("data", "draw", "forward", "backward", "optimizer")
CLOCK = {"cpu time": time.process_time, "wall": time.perf_counter}


class Side:
    """The process of one side, as its parent sees it.

    Args:
        root: the folder whose vrpo, vrpo_kernels and examples it imports.
        objective: "sft" or "vrpo".
    """

    def __init__(self, root: Path, objective: str, threads: int) -> None:
        command = [sys.executable, "-P", "-c", START, str(root), str(HARNESS), objective, str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)

    def ask(self, steps: int) -> dict[str, Any]:
        """Runs so many steps; what `Meter.answer` says of them.

        Errors: RuntimeError if the process has ended.
        """
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process of one side ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()


class Meter:
    """Seconds of each part since the last answer."""

    def __init__(self, threads: int):
        self.clock = CLOCK[clock_name(threads)]
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens, self.rows, self.started = 0, 0, self.clock()

    def timed(self, part: str, function: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += self.clock() - started

        return wrapped

    def answer(self, steps: int) -> dict[str, Any]:
        """Milliseconds of a step, whole and by part, its tokens and its masked rows."""
        whole = 1e3 * (self.clock() - self.started) / steps
        parts = {part: 1e3 * self.seconds[part] / steps for part in PARTS}
        return {"ms": whole, **parts, "tokens": self.tokens / steps, "rows": self.rows / steps}


def clock_name(threads: int) -> str:
    """One thread's own time is disturbed less by other processes; several share the work."""
    return "cpu time" if threads == 1 else "wall"


def make_trainer(objective: str, folder: str) -> Any:
    """The trainer of examples/quickstart.py, on made pairs in place of those its model would sample."""
    from datasets import Dataset
    from transformers import PrinterCallback, ProgressCallback, set_seed

    from examples import arithmetic
    from examples.quickstart import Run, Settings, trainer_arguments
    from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer, VRPOConfig, VRPOTrainer
    from vrpo.models import create_model

    settings, tokenizer = Settings(), arithmetic.build_tokenizer()
    set_seed(settings.seed)
    model = create_model(
        tokenizer,
        d_model=settings.d_model,
        n_layers=settings.n_layers,
        n_heads=4,
        mlp_hidden_size=settings.mlp_hidden_size,
        max_sequence_length=64,
        init_std=0.1,
        seed=settings.seed,
    )
    run = Run(settings, Path(folder), tokenizer, test=[])
    problems = arithmetic.all_problems(settings.seed)[: settings.sft_problems]
    if objective == "sft":
        given = trainer_arguments(run, "sft", 10**6, settings.sft_batch, settings.sft_learning_rate)
        rows = arithmetic.write_corpus(problems, settings.careful_share, settings.seed)
        config = DiffusionSFTConfig(**given, max_eos_fill=settings.max_eos_fill)
        kind = DiffusionSFTTrainer
    else:
        given = trainer_arguments(run, "vrpo", 10**6, settings.vrpo_batch, settings.vrpo_learning_rate)
        rows = [
            {"prompt": p.prompt, "chosen": p.working(carries=True), "rejected": p.working(carries=False)}
            for p in problems
        ]
        given["num_samples"] = settings.num_samples
        config = VRPOConfig(beta=settings.beta, sft_weight=settings.sft_weight, **given)
        kind = VRPOTrainer
    trainer = kind(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def instrument(trainer: Any, meter: Meter) -> None:
    """Wraps what does the parts, in this process for good."""
    from accelerate.optimizer import AcceleratedOptimizer

    from vrpo.gradient import JointStep
    from vrpo.step import Estimator
    from vrpo.training.finite import StopAtBadGradients

    pack = Estimator.pack

    def counted(*args: Any, **kwargs: Any) -> Any:
        packed = pack(*args, **kwargs)
        meter.tokens += len(packed.tokens_T)
        meter.rows += len(packed.row_N)
        return packed

    trainer.get_batch_samples = meter.timed("data", trainer.get_batch_samples)
    trainer._responses = meter.timed("draw", trainer._responses)
    Estimator.pack = meter.timed("draw", counted)
    JointStep.share = meter.timed("forward", JointStep.share)
    trainer.accelerator.backward = meter.timed("backward", trainer.accelerator.backward)
    trainer._clip_grad_norm = meter.timed("optimizer", trainer._clip_grad_norm)
    for kind, name in ((AcceleratedOptimizer, "step"), (StopAtBadGradients, "on_pre_optimizer_step")):
        setattr(kind, name, meter.timed("optimizer", getattr(kind, name)))


def serve(objective: str, threads: int) -> None:
    """Trains, a block of steps for each line of standard input, until the parent ends the process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error
    import torch
    from datasets import disable_progress_bars
    from transformers import TrainerCallback

    disable_progress_bars()
    torch.set_num_threads(threads)
    meter = Meter(threads)

    class Wait(TrainerCallback):
        """After each block: the answer, then the next request."""

        left = asked = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.wait()

        def on_step_end(self, args, state, control, **kwargs):
            self.left -= 1
            if not self.left:
                answers.write(json.dumps(meter.answer(self.asked)) + "\n")
                answers.flush()
                self.wait()

        def wait(self) -> None:
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            self.left = self.asked = int(line)
            meter.restart()

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(objective, folder)
        instrument(trainer, meter)
        trainer.add_callback(Wait())
        trainer.train()
