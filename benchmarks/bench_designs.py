"""python -m benchmarks designs

What a mask design costs: time of its draw, and of a whole training step (draw, pack, reference forward,
policy forward and backward), for every design at the same number of samples, beside the paper's. In ms.
"""

import argparse

import torch
from torch import nn

from benchmarks.record import RESULTS, append, provenance
from benchmarks.timing import interleaved
from vrpo.batch import ResponseBatch
from vrpo.estimator import masking
from vrpo.estimator.designs import DESIGNS
from vrpo.models import LLaDAConfig, LLaDAForMaskedDiffusion
from vrpo.step import Estimator, preference_step

FILE = RESULTS / "designs.csv"
PROMPT = 32
VOCABULARY = 1024
DRAWS = ((64, 8, 128), (16, 8, 512), (16, 8, 4096))
"""(responses R, samples K, mean response length) of the draws that are timed alone."""
STEP = (8, 8, 128)
KINDS = [(name, "independent") for name in DESIGNS] + [("graded-balanced", "positions")]


def make_pairs(num_responses: int, mean_length: int) -> ResponseBatch:
    """Pairs with responses of half to one and a half times the mean length."""
    generator = torch.Generator().manual_seed(0)
    length_R = torch.randint(mean_length // 2, 3 * mean_length // 2, (num_responses,), generator=generator)
    size = int((length_R + PROMPT).sum())
    return ResponseBatch(
        tokens_U=torch.randint(1, VOCABULARY - 1, (size,), generator=generator),
        prompt_length_R=torch.full_like(length_R, PROMPT),
        response_length_R=length_R,
        example_R=torch.arange(num_responses // 2).repeat_interleave(2),
        side_R=torch.tensor([0, 1]).repeat(num_responses // 2),
        num_sides=2,
    )


def make_model(seed: int) -> nn.Module:
    """0.9 M parameters, random weights: a step costs what it costs with trained ones."""
    torch.manual_seed(seed)
    config = LLaDAConfig(
        vocab_size=VOCABULARY,
        embedding_size=VOCABULARY,
        d_model=160,
        n_layers=2,
        n_heads=4,
        mlp_hidden_size=432,
        mask_token_id=VOCABULARY - 1,
    )
    model = LLaDAForMaskedDiffusion(config)
    model.set_attn_implementation("vrpo")
    return model


def time_draws(shapes: tuple, repeats: int, threads: int) -> list[dict]:
    """One row per shape and design: ms of masking.draw."""
    rows = []
    for num_responses, num_samples, mean_length in shapes:
        batch = make_pairs(num_responses, mean_length)
        runs = {
            kind: lambda b=batch, k=kind, n=num_samples: masking.draw(
                b, design=k[0], pair_masks=k[1], num_samples=n, seed=1, epoch=0
            )
            for kind in KINDS
        }
        rows += table("draw", runs, num_responses, num_samples, mean_length, repeats, threads)
    return rows


def time_steps(shape: tuple[int, int, int], repeats: int, threads: int) -> list[dict]:
    """One row per design: ms of a training step without the optimizer."""
    num_responses, num_samples, mean_length = shape
    batch = make_pairs(num_responses, mean_length)
    policy, reference = make_model(0), make_model(1)

    def step(kind: tuple[str, str]) -> None:
        estimator = Estimator(
            mask_token_id=VOCABULARY - 1,
            num_samples=num_samples,
            mask_design=kind[0],
            masks_per_level=1,
            seed=1,
            pair_masks=kind[1],
        )
        result = preference_step(
            batch,
            policy=lambda packed: policy(**packed.model_inputs()).nll,
            reference=lambda packed: reference(**packed.model_inputs()).nll,
            estimator=estimator,
            beta=0.2,
            sft_weight=0.05,
            epoch=0,
            device="cpu",
        )
        policy.zero_grad()
        result.loss_B.mean().backward()

    runs = {kind: lambda k=kind: step(k) for kind in KINDS}
    return table("step", runs, num_responses, num_samples, mean_length, repeats, threads)


def table(
    what: str, runs: dict, num_responses: int, num_samples: int, mean_length: int, repeats: int, threads: int
) -> list[dict]:
    timings = interleaved(runs, device="cpu", threads=threads, repeats=repeats)
    paper = timings["paper", "independent"].quantile(0.5)
    return [
        {
            "what": what,
            "R": num_responses,
            "K": num_samples,
            "mean_length": mean_length,
            "design": design,
            "pair_masks": pair_masks,
            "ms_p20": round(timing.quantile(0.2), 3),
            "ms_p50": round(timing.quantile(0.5), 3),
            "ms_p80": round(timing.quantile(0.8), 3),
            "reps": repeats,
            "to_paper": round(timing.quantile(0.5) / paper, 3),
        }
        for (design, pair_masks), timing in timings.items()
    ]


def main(arguments: list[str]) -> int:
    """Print the table, and append it to results/designs.csv with --save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks designs", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1: CPU time is measured)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/designs.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = time_draws(DRAWS, options.repeats, options.threads)
    rows += time_steps(STEP, options.repeats, options.threads)
    for row in rows:
        print(
            f"{row['what']} R={row['R']:<3} K={row['K']} length={row['mean_length']:<5} "
            f"{row['design']:17}{row['pair_masks']:12} {row['ms_p50']:9.2f} ms "
            f"{row['to_paper']:6.2f} x paper"
        )
    if options.save:
        facts = {**provenance("cpu"), "threads": options.threads}
        append([facts | row for row in rows], FILE, [*facts, *rows[0]])
    return 0
