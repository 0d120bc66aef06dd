"""The tables of docs/cpu.md and of EOS fill, from what CPUs measured.

Result files keep earlier runs, so each run is named here by its revision.
"""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from benchmarks.record import RESULTS
from benchmarks.variance.report import table

Rows = list[dict[str, str]]

COLUMNS = ("no gradient", "frozen head", "trained head")
PROVIDERS = {
    "vrpo": "**vrpo_kernels**",
    "torch eager": "torch eager",
    "torch.compile": "torch.compile",
    "F.linear_cross_entropy": "F.linear_cross_entropy (none)",
    "TRL chunked, chunk 4096": "TRL 1.16 chunked log-prob",
    "CCE, exact": "CCE, exact (torch.compile path)",
}


@dataclass(frozen=True)
class Run:
    """Which rows of kernels.csv; the other fields of a row are the same in all of them."""

    git: str
    dtype: str
    threads: str = "1"
    head: str = "plain"
    N: str = "512"
    D: str = "1024"


ZEN5 = {
    "fp32, 1 thread": Run("78914c0", "fp32"),
    "fp32, 2 threads": Run("fd6ab10", "fp32", "2"),
    "bf16, 1 thread": Run("78914c0", "bf16"),
    "bf16, 2 threads": Run("78914c0", "bf16", "2"),
}
XEON = {
    "fp32, 1 thread": Run("c162d13", "fp32"),
    "fp32, 2 threads": Run("c162d13", "fp32", "2"),
    "bf16, 1 thread": Run("e1d23ee", "bf16"),
    "bf16, 2 threads": Run("c162d13", "bf16", "2"),
}
HEADS = {"plain": "plain", "bias": "with bias", "softcap": "soft-cap 30"}
AMX = {
    f"{dtype}, {title}": Run("f0e2246", dtype, head=head)
    for dtype in ("bf16", "fp32")
    for head, title in HEADS.items()
}
ZEN3 = Run("063653b", "fp32")
WIDE = {
    "Xeon with AMX, 512 rows": Run("f1e0f5e", "bf16", D="4096"),
    "Xeon with AMX, 256 rows": Run("f1e0f5e", "bf16", N="256", D="4096"),
    "Xeon with AMX, 512 rows, 2 threads, a noisy run": Run("41d134b", "bf16", "2", D="4096"),
    "Zen 5, LLaDA's head (V = 126464), 256 rows, 2 threads": Run("9a82530", "bf16", "2", N="256", D="4096"),
}


def _read(name: str) -> Rows:
    with (RESULTS / name).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _rows(rows: Rows, **wanted: str) -> Rows:
    return [row for row in rows if wanted.items() <= row.items()]


def _one(rows: Rows, **wanted: str) -> dict[str, str]:
    """Errors: ValueError unless exactly one row has these values."""
    found = _rows(rows, **wanted)
    if len(found) != 1:
        raise ValueError(f"a table needs one row with {wanted}, the file has {len(found)}")
    return found[0]


def _short(text: str) -> str:
    """Three digits."""
    return f"{float(text):.2f}" if float(text) < 9.995 else f"{float(text):.1f}"


def _units(run: Rows, provider: str) -> str:
    rows = _rows(run, provider=provider)
    if not any(row["units_p50"] for row in rows):
        return "takes none"
    cells = ", ".join(_short(_one(rows, column=column)["units_p50"]) for column in COLUMNS)
    return f"**{cells}**" if provider == "vrpo" else cells


def _error(runs: Iterable[Rows], provider: str) -> str:
    """Of each dtype once."""
    found = {}
    for run in runs:
        for row in _rows(run, provider=provider, column="no gradient"):
            found.setdefault(row["dtype"], row["nll_error"])
    return " / ".join(f"{float(error):.1e}".replace("e-0", "e-") for error in found.values())


def heads(rows: Rows, runs: dict[str, Run]) -> str:
    """Units of every provider in every run, and its error."""
    own = {title: _rows(rows, **asdict(run)) for title, run in runs.items()}
    lines = [
        [name, *(_units(run, provider) for run in own.values()), _error(own.values(), provider)]
        for provider, name in PROVIDERS.items()
    ]
    dtypes = " / ".join(dict.fromkeys(run.dtype for run in runs.values()))
    return table(["", *runs, f"NLL error {dtypes}"], lines)


def _best_rival(run: Rows, column: str) -> tuple[float, str]:
    """(units, provider) of the fastest other one."""
    timed = [row for row in _rows(run, column=column) if row["units_p50"]]
    others = [row for row in timed if not row["provider"].startswith(("vrpo", "bare "))]
    return min((float(row["units_p50"]), row["provider"]) for row in others)


def best(rows: Rows, runs: dict[str, Run]) -> str:
    """Units of ours, of the fastest other one of each column, and how many times longer that takes."""
    lines = []
    for title, run in runs.items():
        own = _rows(rows, **asdict(run))
        ours = [float(_one(own, provider="vrpo", column=column)["units_p50"]) for column in COLUMNS]
        rivals = [_best_rival(own, column)[0] for column in COLUMNS]
        peaks = [_peaks(own, is_ours) for is_ours in (True, False)]
        ratios = [rival / mine for rival, mine in zip(rivals, ours, strict=True)]
        cells = (", ".join(f"{value:.2f}" for value in values) for values in (ours, rivals, ratios))
        lines.append([title, *cells, *peaks])
    header = [
        "",
        "ours, units",
        "best of the others",
        "they take, times",
        "MiB, frozen head",
        "of the others",
    ]
    return table(header, lines)


def _peaks(run: Rows, is_ours: bool) -> str:
    """Peak MiB beside the inputs with a frozen head: of ours, or from the least to the most of the others."""
    timed = [row for row in _rows(run, column="frozen head") if row["peak_MiB"]]
    found = [
        int(row["peak_MiB"])
        for row in timed
        if (row["provider"] == "vrpo" if is_ours else not row["provider"].startswith("vrpo"))
    ]
    return str(found[0]) if is_ours else f"{min(found)} to {max(found)}"


def above(rows: Rows) -> str:
    """What a bias and a soft-cap cost above the plain head, from the run with the most rounds."""
    lines = []
    for dtype, rounds in (("bf16", "80"), ("fp32", "30")):
        for column in COLUMNS:
            run = _rows(
                rows, git="74ee4fe", dtype=dtype, reps=rounds, provider="vrpo", column=column, D="1024"
            )
            notes = [_one(run, head=head, threads="1")["note"] for head in ("bias", "softcap")]
            lines.append([f"{dtype}, {column}", *(note.partition(" units")[0] for note in notes)])
    return table(["", "bias", "soft-cap 30"], lines)


def cross_entropy(rows: Rows) -> str:
    """Milliseconds of each provider: no gradient, forward and backward, in place."""
    names = {
        "vrpo": "**vrpo_kernels**",
        "torch.compile, .float()": "torch.compile of F.cross_entropy(logits[rows].float())",
        "torch eager, .float()": "the same, eager",
        "TRL selective_log_softmax": "TRL selective_log_softmax(logits[rows])",
    }
    runs = [(dtype, threads) for dtype in ("fp32", "bf16") for threads in ("1", "2")]
    lines = []
    for provider, name in names.items():
        line = [name]
        for dtype, threads in runs:
            own = _rows(rows, provider=provider, dtype=dtype, threads=threads, git="78914c0")
            columns = ("no gradient", "forward and backward", "in place")
            found = [row for column in columns for row in _rows(own, column=column)]
            line.append(", ".join(f"{float(row['ms_p50']):#.3g}".rstrip(".") for row in found))
        lines.append(line)
    titles = [f"{dtype}, {threads} thread{'s' * (threads != '1')}" for dtype, threads in runs]
    return table(["", *titles], lines)


def eos_fill(rows: Rows) -> str:
    """Share of answers of a copy task that are right, by the law of the fill in SFT."""
    laws = {
        "none": "none",
        "longest of the batch": "to the longest of the batch, as LLaDA pads",
        "uniform": "uniform up to 36",
        "log-uniform": "**log-uniform up to 36** (the default's law)",
    }
    shares = ("copy_1x_block", "copy_2x_block", "copy_4x_block", "copy_4x_blocks")
    lines = []
    for law, name in laws.items():
        row = _one(rows, law=law, normalised_by="total")
        cells = [f"{100 * float(row[share]):.0f} %" for share in shares]
        lines.append([name, row["tokens_per_step"], *cells])
    return table(["EOS fill in SFT", "packed tokens a step", "1x", "2x", "4x", "4x, in blocks"], lines)


def attention(rows: Rows) -> str:
    """Milliseconds forward and backward of the newest run of each case and number of threads."""
    newest = {(row["case"], row["threads"], row["provider"]): row for row in rows}
    cases = list(dict.fromkeys(key[:2] for key in newest))
    providers = list(dict.fromkeys(key[2] for key in newest))
    lines = []
    for case, threads in cases:
        own = [newest[case, threads, provider] for provider in providers]
        first, cells = own[0], [f"{float(row['ms']):.3g}" if row["ms"] else "-" for row in own]
        lines.append([case, threads, first["segments"], first["tokens"], first["longest"], *cells])
    return table(["segments of", "threads", "segments", "tokens", "longest", *providers], lines)


def page_tables() -> dict[str, str]:
    """For `python -m benchmarks pages`."""
    rows = _read("kernels.csv")
    beside: dict[str, Run] = {
        f"{name}, {title}": run
        for name, runs in (("Zen 5", ZEN5), ("Xeon without AMX", XEON), ("Xeon with AMX", AMX))
        for title, run in runs.items()
    }
    return {
        "zen5": heads(rows, ZEN5),
        "xeon": heads(rows, XEON),
        "amx": heads(rows, _part(AMX, "bf16")),
        "amx-fp32": heads(rows, _part(AMX, "fp32")),
        "above": above(rows),
        "best": best(rows, beside | {"Zen 3 (AVX2 only), fp32, 1 thread": ZEN3}),
        "wide": best(rows, WIDE),
        "cross-entropy": cross_entropy(_read("cross_entropy.csv")),
        "attention": attention(_read("attention.csv")),
        "eos-fill": eos_fill(_read("eos_fill.csv")),
    }


def _part(runs: dict[str, Run], dtype: str) -> dict[str, Run]:
    return {title.partition(", ")[2]: run for title, run in runs.items() if run.dtype == dtype}
