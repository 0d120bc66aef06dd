"""What a step of the trainer costs with each of its options, in one run: shared trunk, replay, LoRA.

    python -m benchmarks trainer --threads 1

One step is `VRPOTrainer.training_step` on the same pairs, with the same masks: the reference, and the policy
with backward; in float32 on a CPU, under bfloat16 autocast on a GPU (--bf16, --no-bf16). Before anything is
timed, the gradient of each variant has to equal that of its baseline, on the weights that both train: to 1e-4
in float32, to 1e-3 under autocast, compiled layers there to 5e-2, since they round elsewhere. Rounds are
interleaved and the fastest of each counts; one row per variant goes to benchmarks/results/trainer.csv.
"""

import argparse
import copy
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.timing import clock_name, interleaved
from vrpo import VRPOConfig, VRPOTrainer
from vrpo.commands.new_model import train_tokenizer
from vrpo.models import create_model

FIELDS = (
    "date", "git", "dirty", "device", "torch", "triton", "threads", "precision", "parameters", "layers",
    "vocabulary", "pairs", "tokens_per_pair", "num_samples", "variant", "baseline", "gradient_error", "clock",
    "ms", "ms_median", "speedup", "rounds",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """Fields of VRPOConfig, with or without an adapter; what its gradient and time are compared with."""

    baseline: str
    fields: dict[str, Any] = field(default_factory=dict)
    lora: bool = False

    def allowed_error(self, precision: str) -> float:
        """Of the gradient, relative. Compiled layers round elsewhere, and bfloat16 coarsely."""
        if precision == "float32":
            return 1e-4
        return 5e-2 if "torch_compile" in self.fields else 1e-3


def variants(layers: int) -> dict[str, Variant]:
    """The upper half trains in "top"; "plain" trains everything and "lora" adapts every layer."""
    half = {"train_top_layers": layers // 2}
    apart = {"share_trunk": False}
    known = {"precompute_ref_log_probs": True}
    return {
        "plain": Variant("plain"),
        "plain, precomputed": Variant("plain", known),
        "plain, replay": Variant("plain", {"gradient_mode": "replay"}),
        "plain, compiled": Variant("plain", {"torch_compile": True}),
        "top, apart": Variant("plain", half | apart),
        "top, shared trunk": Variant("plain", half),
        "lora": Variant("lora", lora=True),
        "lora, precomputed": Variant("lora", known, lora=True),
        "lora, replay": Variant("lora", {"gradient_mode": "replay"}, lora=True),
        "lora, compiled": Variant("lora", {"torch_compile": True}, lora=True),
        "lora top, apart": Variant("lora", half | apart, lora=True),
        "lora top, shared trunk": Variant("lora", half, lora=True),
    }


class Bench:
    """The trainers of all variants on one model, one batch of pairs each, equal but for their options."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        tokenizer = train_tokenizer(["one two three four"], vocab_size=300)
        self.tokenizer = tokenizer
        self.model = create_model(
            tokenizer,
            d_model=args.hidden,
            n_layers=args.layers,
            n_heads=args.hidden // 64 or 1,
            seed=0,
        )
        self.model.resize_token_embeddings(args.vocabulary, mean_resizing=False)
        drawn = random.Random(args.seed)

        def ids(length: int) -> list[int]:
            return [drawn.randrange(20, len(tokenizer)) for _ in range(length)]

        sizes = {"prompt_ids": args.prompt, "chosen_ids": args.response, "rejected_ids": args.response}
        self.rows = [{name: ids(length) for name, length in sizes.items()} for _ in range(args.pairs)]

    def trainer(self, name: str, variant: Variant) -> VRPOTrainer:
        peft_config = None
        if variant.lora:
            from peft import LoraConfig

            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            peft_config = LoraConfig(r=8, target_modules=targets)
        config = VRPOConfig(
            output_dir=str(self.folder / name.replace(" ", "_").replace(",", "")),
            num_samples=self.args.num_samples,
            per_device_train_batch_size=self.args.pairs,
            gradient_accumulation_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=self.args.bf16,
            **variant.fields,
        )
        trainer = VRPOTrainer(
            copy.deepcopy(self.model),
            args=config,
            train_dataset=self.rows,
            processing_class=self.tokenizer,
            peft_config=peft_config,
        )
        set_adapters(trainer.model)
        trainer.create_optimizer()
        # As `train` does it: this puts the model under autocast, where the reference is already.
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model.train()
        return trainer


@torch.no_grad()
def set_adapters(model: torch.nn.Module) -> None:
    """lora_A of equal names alike, whichever layers have one; lora_B stays 0, as PEFT makes it."""
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            drawn = torch.Generator().manual_seed(sum(map(ord, name)))
            weight.copy_(torch.randn(weight.shape, generator=drawn) * weight.shape[1] ** -0.5)


def step_of(trainer: VRPOTrainer, num_pairs: int):
    """A callable that runs one step and leaves its gradient in the model."""
    batch = next(iter(trainer.get_train_dataloader()))

    def step() -> None:
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, batch, num_pairs)

    return step


def gradient_error(model: torch.nn.Module, want: dict[str, Tensor]) -> float:
    """|difference| / |want| of the gradients, over the weights that the model trains."""
    pairs = [
        (p.grad.double(), want[name].double())
        for name, p in model.named_parameters()
        if p.grad is not None and p.requires_grad
    ]
    difference = torch.stack([(got - expected).norm() for got, expected in pairs]).norm()
    return (difference / torch.stack([expected.norm() for _, expected in pairs]).norm()).item()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        chosen = {name: v for name, v in variants(args.layers).items() if name in (args.variants or [name])}
        trainers = {name: bench.trainer(name, variant) for name, variant in chosen.items()}
        steps = {name: step_of(trainer, args.pairs) for name, trainer in trainers.items()}
        precision = "bfloat16" if trainers[next(iter(trainers))].args.bf16 else "float32"
        errors = check(trainers, steps, chosen, precision)
        started = time.monotonic()
        timings = interleaved(
            steps,
            device=device,
            threads=args.threads,
            repeats=args.rounds,
            deadline=started + args.seconds,
        )
    best = {name: min(timing.samples) for name, timing in timings.items()}
    shared = record.provenance(device) | {
        "threads": args.threads,
        "precision": precision,
        "parameters": sum(p.numel() for p in bench.model.parameters()),
        "layers": args.layers,
        "vocabulary": args.vocabulary,
        "pairs": args.pairs,
        "tokens_per_pair": 2 * (args.prompt + args.response),
        "num_samples": args.num_samples,
        "clock": clock_name(device, args.threads),
    }
    return [
        shared
        | {
            "variant": name,
            "baseline": variant.baseline,
            "gradient_error": f"{errors[name]:.1e}",
            "ms": round(best[name], 1),
            "ms_median": round(timings[name].quantile(0.5), 1),
            "speedup": round(best[variant.baseline] / best[name], 3),
            "rounds": len(timings[name].samples),
        }
        for name, variant in chosen.items()
    ]


def check(trainers, steps, chosen, precision: str) -> dict[str, float]:
    """Errors of the gradients against the baselines'; RuntimeError where one is not the same."""
    found: dict[str, float] = {}
    baselines: dict[str, dict[str, Tensor]] = {}
    for name in sorted(chosen, key=lambda name: chosen[name].baseline != name):
        steps[name]()
        model = trainers[name].model
        if chosen[name].baseline == name:
            baselines[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[name] = gradient_error(model, baselines[chosen[name].baseline])
        if not found[name] < chosen[name].allowed_error(precision):
            raise RuntimeError(
                f"{name}: the gradient differs by {found[name]:.1e} from {chosen[name].baseline}"
            )
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks trainer", description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=60)
    parser.add_argument("--response", type=int, default=80)
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600, help="no further round after so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="autocast; on with a GPU")
    parser.add_argument("--variants", nargs="+", help="some only, with their baseline")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "trainer.csv")
    args = parser.parse_args(arguments)
    for name in args.variants or []:
        if name not in variants(args.layers):
            parser.error(f"--variants must be of {', '.join(variants(args.layers))}, got {name!r}")
        if variants(args.layers)[name].baseline not in args.variants:
            parser.error(f"--variants: {name!r} is compared with {variants(args.layers)[name].baseline!r}")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    rows = measure(args)
    record.append(rows, args.output, FIELDS)
    for row in rows:
        print(f"{row['variant']:24s} {row['ms']:9.1f} ms  {row['speedup']:5.2f} x {row['baseline']}"
              f"  gradient {row['gradient_error']}")  # fmt: skip
    return 0
