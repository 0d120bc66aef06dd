"""Measure the trained models, one result file per model; a run that was cut goes on where it stopped.

Rows that belong to the same draws are written together as soon as they are known, and are not measured again
where the file has the last of them. A new file's masks come from a seed of the model's own, so that the luck
of the draws averages out over models. Rows name the weights they were measured on, and a file takes no
others. --train makes a model that is not there (benchmarks/variance/models.py says how), each in a process of
its own. On a GPU (--device cuda) all of it runs in float32 as well.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from datasets import load_dataset

from benchmarks.record import RESULTS, provenance
from benchmarks.variance import measure
from benchmarks.variance.bound import bound_rows
from benchmarks.variance.models import TASKS, check_device
from vrpo import data
from vrpo.batch import ResponseBatch
from vrpo.evaluation import noise
from vrpo.evaluation.variance import Scheme
from vrpo.models import load_config, load_model, load_tokenizer

FOLDER = RESULTS / "variance"
DRIFTS = ("small", "early", "late")
SCORED = ["late", "early"]
STAGES = ["reference", "sft-early"]

# Pairs to measure on and a factor for the number of draws: what a model costs decides.
EFFORT = {
    "arithmetic": (32, 1.0),
    "carrying": (32, 1.0),
    "gsm8k": (32, 1.0),
    "gsm8k-long": (24, 2.0),
    "gsm8k-10m": (32, 2.0),
}

SEED_STEP = 1000
"""Masks of model n are drawn from the seed 1000 n, unless --seed names another."""

PREDICTED = ["paper", "stratified", "tiled", "coupled", "folded-loo", "folded-balanced", "spaced", "balanced"]
PREDICTED += ["mirrored-balanced", "inverse-root", "graded", "graded-balanced"]


def read_rows(file: Path) -> list[dict]:
    """Rows of a result file. Half a line at its end, which a run that was cut leaves, is no row."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def append_rows(file: Path, rows: Iterable[dict]) -> None:
    """Append rows in one piece; half a line at the end of the file goes away first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as stream:
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def fingerprint(folder: Path) -> str:
    """Of the weights of a model's checkpoints that are measured."""
    digest = hashlib.sha256()
    for name in ("reference", "sft-early", *DRIFTS):
        for file in sorted((folder / name).glob("*.safetensors")):
            digest.update(f"{name}/{file.name}".encode())
            with file.open("rb") as weights:
                digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()[:12]


def load_pairs(models: Path, num_pairs: int) -> tuple[ResponseBatch, int]:
    """The first held-out pairs, and the id of the mask token."""
    tokenizer = load_tokenizer(str(models / "reference"))
    config = load_config(str(models / "reference"))
    max_length = json.loads((models / "training.json").read_text())["max_length"]
    rows = load_dataset("json", data_files=str(models / "pairs.jsonl"), split="train")
    prepared, _ = data.prepare_pairs(
        rows.select(range(min(num_pairs, len(rows)))),
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_length // 4,
        vocab_size=config.vocab_size,
    )
    return data.PairCollator()(list(prepared))["responses"], config.mask_token_id


class Model:
    """A trained model's folder, its pairs, and the file its rows go to."""

    def __init__(self, folder: Path, seed: int | None = None, device: str = "cpu"):
        self.folder, self.device = folder, device
        self.task, _, number = folder.name.rpartition("-")
        self.number = int(number)
        self.num_pairs, self.effort = EFFORT[self.task]
        self.file = FOLDER / f"{folder.name}.jsonl"
        rows = read_rows(self.file)
        known = {row.get("seed", 0) for row in rows}  # the first files do not say: they are of 0
        if seed is None:
            seed = min(known, default=SEED_STEP * self.number)
        self.seed, self.weights = seed, fingerprint(folder)
        others = sorted(known - {seed})
        if others:
            raise SystemExit(f"{self.file} holds draws of --seed {others[0]}, not {seed}: move it away first")
        others = sorted({row["weights"] for row in rows if "weights" in row} - {self.weights})
        if others:
            raise SystemExit(
                f"{self.file} holds figures of the weights {others[0]}, and {folder} has {self.weights}: "
                "move it away first"
            )
        self.known = {key(row) for row in rows}
        self.loaded: dict[str, torch.nn.Module] = {}

    @property
    def options(self) -> dict:
        """What every measurement takes."""
        return {"seed": self.seed, "device": self.device}

    def load(self, name: str) -> torch.nn.Module:
        if name not in self.loaded:
            self.loaded[name] = load_model(str(self.folder / name)).requires_grad_(False).to(self.device)
        return self.loaded[name]

    def pairs(self, share: float = 1.0) -> tuple[ResponseBatch, int]:
        return load_pairs(self.folder, max(4, round(self.num_pairs * share)))

    def has(self, **names: object) -> bool:
        """Ask for the last of the rows that are written together: a run may be cut between them."""
        return key(names) in self.known

    def write(self, rows: Iterable[dict], seconds: float) -> None:
        facts = provenance(self.device)
        facts |= {"task": self.task, "model": self.number, "weights": self.weights, "seed": self.seed}
        rows = [facts | row for row in rows]
        append_rows(self.file, rows)
        last = rows[-1]
        print(
            f"{self.folder.name} {last['kind']} {last['design']} K={last['num_samples']}: {seconds:.0f} s",
            flush=True,
        )


def key(row: dict) -> tuple:
    """What makes a measurement: rows with equal keys are the same figure."""
    return tuple(row.get(name) for name in ("kind", "drift", "design", "pair_masks", "num_samples"))


def scores(model: Model) -> None:
    """Fresh draws, K = 4 first; the reference's ELBOs by themselves come from the same forward passes."""
    for draw in measure.score_draws(model.effort):
        last = list(draw.weightings)[-1]
        if model.has(kind="score", drift=SCORED[-1], design=last, num_samples=draw.num_samples):
            continue
        started = time.perf_counter()
        models = [model.load(name) for name in ["reference", *SCORED]]
        batch, mask_token_id = model.pairs()
        found = measure.elbos(models, batch, draw, mask_token_id=mask_token_id, **model.options)
        reference = {name: by_model[:1] for name, by_model in found.items() if name != "ratio"}
        rows = [
            *measure.absolute_rows(draw, reference, ["reference"]),
            *measure.score_rows(draw, found, SCORED),
        ]
        model.write(rows, time.perf_counter() - started)


def absolute(model: Model) -> None:
    """The designs that are for ELBOs by themselves, and all of them on the model early in its training."""
    for stage in STAGES:
        draws = measure.absolute_draws(model.effort)
        if stage != "reference":
            draws += [draw for draw in measure.score_draws(model.effort / 2) if draw.design != "inverse-root"]
        for draw in draws:
            draw = replace(draw, weightings={k: v for k, v in draw.weightings.items() if k != "ratio"})
            last = list(draw.weightings)[-1]
            if model.has(kind="absolute", drift=stage, design=last, num_samples=draw.num_samples):
                continue
            started = time.perf_counter()
            batch, mask_token_id = model.pairs()
            found = measure.elbos(
                [model.load(stage)], batch, draw, mask_token_id=mask_token_id, **model.options
            )
            model.write(measure.absolute_rows(draw, found, [stage]), time.perf_counter() - started)


def gradients(model: Model) -> None:
    """Half of the pairs: a backward pass costs two forward passes."""
    for drift in SCORED:
        for design, pair_masks, num_samples in measure.GRADIENTS:
            if num_samples == 8 and drift == "early":
                continue
            named = {"drift": drift, "design": design, "pair_masks": pair_masks, "num_samples": num_samples}
            if model.has(kind="gradient", **named):
                continue
            started = time.perf_counter()
            batch, mask_token_id = model.pairs(0.5)
            row = measure.gradient_row(
                model.load(drift),
                model.load("reference"),
                batch,
                Scheme(design, num_samples, pair_masks=pair_masks),
                mask_token_id=mask_token_id,
                repeats=max(4, round(6 * model.effort)),
                **model.options,
            )
            model.write([row | named], time.perf_counter() - started)


def table2(model: Model) -> None:
    """The rows of the paper's Table 2, late drift."""
    for design, scheme in measure.TABLE2.items():
        named = {"drift": "late", "design": design, "num_samples": scheme.num_samples}
        if model.has(kind="table2", **named):
            continue
        batch, mask_token_id = model.pairs()
        started = time.perf_counter()
        row = measure.gradient_row(
            model.load("late"),
            model.load("reference"),
            batch,
            scheme,
            mask_token_id=mask_token_id,
            repeats=max(4, round(6 * model.effort)),
            **model.options,
        )
        model.write([row | named | {"kind": "table2"}], time.perf_counter() - started)


def sft(model: Model) -> None:
    """The SFT loss with several samples, half of the pairs."""
    for stage in STAGES:
        for number in (4, 2):
            for design in measure.SFT_DESIGNS:
                named = {"drift": stage, "design": design, "num_samples": number}
                if model.has(kind="sft", **named):
                    continue
                batch, mask_token_id = model.pairs(0.5)
                started = time.perf_counter()
                row = measure.sft_row(
                    model.load(stage),
                    batch,
                    Scheme(design, number),
                    mask_token_id=mask_token_id,
                    repeats=max(4, round(6 * model.effort)),
                    **model.options,
                )
                model.write([row | named], time.perf_counter() - started)


def predictions(model: Model) -> None:
    """Variances that the moments of other draws predict for exact designs, and the bound of any weights.

    Seeds differ from those of the other measurements: what is predicted is not what the moments come from.
    """
    last = {"design": PREDICTED[-1], "pair_masks": "independent", "num_samples": 4}
    stages = [*DRIFTS, "reference"]
    missing = [drift for drift in stages if not model.has(kind="predicted", drift=drift, **last)]
    if not missing:
        return
    batch, mask_token_id = model.pairs()
    started = time.perf_counter()
    options = {
        "mask_token_id": mask_token_id,
        "num_repeats": max(4, round(6 * model.effort)),
        "seed": model.seed + 1,
        "device": model.device,
        "max_tokens_per_pack": measure.MAX_TOKENS,
    }
    policies, reference = [model.load(drift) for drift in DRIFTS], model.load("reference")
    noises = noise.measure_all(policies, reference, batch, **options)
    noises.append(noise.measure(reference, None, batch, **options))
    for drift, measured in zip(stages, noises, strict=True):
        if drift not in missing:
            continue
        rows = []
        for number in (8, 4):
            for name in PREDICTED:
                for pair_masks in ("positions", "independent"):
                    scheme = Scheme(name, number, pair_masks=pair_masks)
                    told = noise.predict(measured, scheme, beta=measure.BETA, num_draws=256)
                    named = {"drift": drift, "design": name, "pair_masks": pair_masks, "num_samples": number}
                    figures = {part: float(f"{x:.4g}") for part, x in told.items()}
                    rows.append({"kind": "predicted"} | named | figures)
        model.write([*bound_rows(measured, drift, measure.BETA), *rows], time.perf_counter() - started)


KINDS: dict[str, Callable[[Model], None]] = {
    "scores": scores,
    "predictions": predictions,
    "gradients": gradients,
    "absolute": absolute,
    "sft": sft,
    "table2": table2,
}


def train(folder: Path, task: str, number: int, data_folder: Path, device: str) -> None:
    """Make the model in a process of its own, unless it is there."""
    if (folder / "training.json").exists():
        return
    command = [sys.executable, "-m", "benchmarks.variance.models", task, "--out", str(folder)]
    command += ["--seed", str(number), "--data", str(data_folder), "--device", device]
    if TASKS[task].start:
        start = folder.parent / f"{TASKS[task].start}-{number}"
        train(start, TASKS[task].start, number, data_folder, device)
        command += ["--start", str(start / "reference")]
    subprocess.run(command, check=True)


def run(args: argparse.Namespace) -> int:
    check_device(args.device)
    torch.set_num_threads(args.threads)
    for task in args.tasks:
        for number in args.models:
            folder = args.folder / f"{task}-{number}"
            trained = (folder / "training.json").exists()
            if not trained and read_rows(FOLDER / f"{folder.name}.jsonl"):
                print(f"{folder.name}: its file is of a model that is not here; move it away to make another")
                continue
            if args.train:
                train(folder, task, number, args.data, args.device)
            if not (folder / "training.json").exists():
                print(f"{folder.name}: not trained, left out")
                continue
            model = Model(folder, args.seed, args.device)
            for kind in args.kinds:
                KINDS[kind](model)
    return 0
