"""python -m benchmarks NAME [options]: runs one benchmark. `python -m benchmarks NAME --help` explains it.

`pytest benchmarks/micro --benchmark-only` times every operation of vrpo_kernels by itself.
"""

import importlib
import os
import sys

BENCHMARKS = {
    "kernels": ("benchmarks.bench_linear_cross_entropy", "linear_cross_entropy against every rival"),
    "cross-entropy": (
        "benchmarks.bench_cross_entropy",
        "cross_entropy of logits against every rival",
    ),
    "attention": (
        "benchmarks.bench_attention",
        "attention in segments on a CPU against SDPA",
    ),
    "compare": ("benchmarks.bench_compare", "every op against another revision, in turns"),
    "designs": ("benchmarks.bench_designs", "draw and step time of every mask design"),
    "eos-fill": ("benchmarks.bench_eos_fill", "which EOS fill teaches a model to stop, and its cost"),
    "variance": ("benchmarks.variance.command", "variance under every mask design, over trained models"),
    "step": ("benchmarks.step.bench", "the step by technique: public code, hand assembly, ours, floors"),
    "gpu-step": ("benchmarks.bench_step", "the whole VRPO step at LLaDA-8B's shape on one GPU"),
    "generate": ("benchmarks.bench_generate", "tokens per second of decoding, against the public loop"),
    "sft": ("benchmarks.bench_sft", "the steps of the quickstart's model on a CPU, part by part"),
    "trainer": ("benchmarks.bench_trainer", "a step of the trainer with each of its options"),
    "gpu-table": ("benchmarks.gpu_table", "Markdown tables of what `make gpu` measured"),
    "liger-view": ("benchmarks.liger_view", "a kernels CSV in Liger's columns, and back"),
    "model": ("benchmarks.bench_model", "expected GPU times of linear_cross_entropy, beside measured ones"),
    "masking": ("benchmarks.bench_masking", "mask draw and packing against a torch.randperm loop"),
    "pages": ("benchmarks.pages.command", "tables and figures of README.md and docs, from the result files"),
    "scaling": ("benchmarks.bench_scaling", "how time and memory of a step grow, measured and modelled"),
    "memory": ("benchmarks.bench_memory", "peak memory of a step against K, and what a replay costs"),
}


def main() -> int:
    """Dispatch to the module's `main(arguments)`."""
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        if sys.argv[1:] and sys.argv[1] not in ("-h", "--help"):
            print(f"python -m benchmarks: no benchmark is called {sys.argv[1]!r}\n", file=sys.stderr)
        print(__doc__)
        for name, (_, summary) in BENCHMARKS.items():
            print(f"  {name:12s} {summary}")
        return 2
    return importlib.import_module(BENCHMARKS[sys.argv[1]][0]).main(sys.argv[2:])


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    raise SystemExit(status)
