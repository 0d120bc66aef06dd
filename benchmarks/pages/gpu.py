"""The tables of docs/gpu-results.md, and the shorter ones of docs/gpu.md and README.md."""

from benchmarks.gpu_model import DEVICES, Head, Model
from benchmarks.gpu_table import COLUMNS, MODES, number, read, tables
from benchmarks.record import RESULTS
from benchmarks.variance.report import table

KERNELS, FIRST, TILES = (RESULTS / "gpu" / f"h100-2026-11-27{part}" for part in ("", "-first", "-tiles"))

Rows = list[dict[str, str]]

RIVALS = {
    "vrpo": "**vrpo**",
    "vrpo, tiles recomputed": "vrpo, tiles recomputed",
    "torch.compile": "torch.compile",
    "TRL chunked, chunk 32768": "TRL, chunk 32768",
    "Liger": "Liger",
    "CCE, exact": "CCE, exact",
    "torch eager": "eager",
}
SUSTAINED = {"": "bare product", **{mode: mode for mode in MODES[:3]}}


def _one(rows: Rows, **wanted: str) -> dict[str, str]:
    """Errors: ValueError unless exactly one row has these values."""
    found = [row for row in rows if wanted.items() <= row.items()]
    if len(found) != 1:
        raise ValueError(f"a table needs one row with {wanted}, the file has {len(found)}")
    return found[0]


def rivals(rows: Rows, size: str) -> str:
    """ms (units), peak MiB of every package in every column at one N, and its error."""
    lines = []
    for provider, name in RIVALS.items():
        own = [_one(rows, provider=provider, column=column, N=size, head="plain") for column in COLUMNS]
        cells = [f"{row['ms_p50']} ({row['units_p50']}), {row['peak_MiB']}" for row in own]
        lines.append([name, *cells, f"{float(own[0]['nll_error']):.1e}".replace("e-0", "e-")])
    return table(["", *COLUMNS, "nll error, nats"], lines)


def best(runs: dict[str, Rows]) -> str:
    """Ours and the fastest other one of each column, and how many times longer that takes."""
    lines = []
    for name, rows in runs.items():
        timed = [row for row in rows if row["ms_p50"] and row["column"] in COLUMNS]
        for size, kind in dict.fromkeys((row["N"], row["head"]) for row in timed):
            own = [row for row in timed if (row["N"], row["head"]) == (size, kind)]
            others = [row for row in own if not row["provider"].startswith("vrpo")]
            if {row["column"] for row in others} != set(COLUMNS):
                continue
            ours, rival, ratio = [], [], []
            for column in COLUMNS:
                mine = float(_one(own, provider="vrpo", column=column)["units_p50"])
                fastest = min(float(row["units_p50"]) for row in others if row["column"] == column)
                ours.append(f"{mine:.2f}")
                rival.append(f"{fastest:.2f}")
                ratio.append(f"{fastest / mine:.2f}")
            head = "" if kind == "plain" else f", {kind}"
            lines.append([f"{name}, N = {size}{head}", *map(", ".join, (ours, rival, ratio))])
    return table(["", "ours", "best of the others", "they take, times"], lines)


def steps(rows: Rows) -> str:
    """Whole steps: LoRA with 1, 8 and 16 samples, all weights with 8."""
    names = {"LoRA": "LoRA r = 16", "full": "all weights, no optimizer state"}
    lines = []
    for case, samples in (("LoRA", "1"), ("LoRA", "8"), ("LoRA", "16"), ("full", "8")):
        row = _one(rows, case=case, K=samples)
        figures = [number(row[name], 0) for name in ("ms", "tokens_per_s", "pct_of_gemm")]
        lines.append([names[case], samples, *figures, number(row["peak_GiB"], 1)])
    return table(["", "K", "ms", "tokens/s", "% of bare GEMM", "peak GiB"], lines)


def lora_steps(rows: Rows) -> str:
    """LoRA steps, a column for each K."""
    roof = _one(rows, case="gemm roof")
    titles = {
        "ms": ("ms a step of one pair, 512 + 512 tokens", 0),
        "tokens_per_s": ("tokens/s", 0),
        "pct_of_gemm": (f"% of the bare product ({float(roof['tflops']):.0f} TFLOP/s)", 0),
        "peak_GiB": ("peak GiB", 1),
    }
    known = sorted(int(row["K"]) for row in rows if row["case"] == "LoRA")
    lines = [
        [title, *(number(_one(rows, case="LoRA", K=str(samples))[name], digits) for samples in known)]
        for name, (title, digits) in titles.items()
    ]
    return table(["LoRA r = 16, checkpointing", *(f"K = {samples}" for samples in known)], lines)


def head(rows: Rows) -> str:
    """ms and % of the bare product of LLaDA's head, and what the model of the kernel says."""
    modes = MODES[:3]
    own = [
        row
        for row in rows
        if (row["provider"], row["gemm"], row["D"], row["case"]) == ("vrpo", "fused", "4096", "random logits")
    ]
    lines = []
    for size in sorted({int(row["N"]) for row in own}):
        model = Model(DEVICES["H100"], Head(size, 4096, 126464))
        line = [str(size)]
        for mode in modes:
            row = _one(own, N=str(size), mode=mode)
            line += [f"{number(row['ms_p50'], 2)} ({number(row['pct_of_gemm'], 0)} %)"]
            line += [f"{model.ms(mode):.2f}"]
        lines.append(line)
    return table(["N", *(title for mode in modes for title in (mode, "predicted"))], lines)


def sustained(rows: Rows) -> str:
    """Time and energy at the power limit, N = 4096."""
    own = {row["mode"]: row for row in rows if row["joule"]}
    unit = float(own[""]["ms_p50"])
    lines = []
    for mode, name in SUSTAINED.items():
        row = own[mode]
        share = 100 * float(row["units"]) * unit / float(row["ms_p50"])
        lines.append([name, number(row["ms_p50"], 2), number(row["joule"], 2), row["sm_mhz"], f"{share:.0f}"])
    return table(["N = 4096", "ms", "J", "MHz", "% of the bare product"], lines)


def page_tables() -> dict[str, str]:
    """For `python -m benchmarks pages`."""
    kernels = read(KERNELS / "kernels.csv")
    step = read(FIRST / "step.csv")
    first, second = (read(folder / "rivals.csv") for folder in (FIRST, KERNELS))
    return {
        "all": "\n".join(tables(KERNELS, FIRST, TILES)).strip(),
        "rivals-4096": rivals(first, "4096"),
        "best": best({"4fd4141": first, "2d0ff9f": second}),
        "steps": steps(step),
        "lora-steps": lora_steps(step),
        "head": head(kernels),
        "sustained": sustained(kernels),
    }
