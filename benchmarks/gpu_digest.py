"""What a run of `make gpu` found, in a few lines per file: read from its CSV files, printed at its end.

python3 -m benchmarks.gpu_digest [DIR]
"""

import csv
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

BEST = 3  # tile shapes shown per size, mode and form


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _worst(rows: list[dict[str, str]], name: str) -> str:
    found = [row[name] for row in rows if row[name]]
    return max(found, key=float) if found else "-"


def kernels(rows: list[dict[str, str]]) -> Iterator[str]:
    """One line per size and form: milliseconds and % of the bare GEMM of each mode, worst errors."""
    for row in rows:
        if row["op"] == "mm" and row["ms_p50"]:
            speed = f"{float(row['ms_p50']):.2f} ms, {row['tflops']} TFLOP/s, {row['pct_of_gemm']} %"
            yield f"{_size(row)}: {row['provider']} {speed}"
        elif row["provider"].endswith("fp64 softmax"):
            yield f"{_size(row)}: {row['provider']}: nll {row['nll_err']} nats, bias {row['nll_bias']}"
    ours = [row for row in rows if row["provider"].startswith("vrpo")]
    for (size, form), group in groupby(ours, key=lambda row: (_size(row), _form(row))):
        found = list(group)
        cells = (f"{row['mode']} {_time(row)}" for row in found)
        errors = ", ".join(f"{name} {_worst(found, name)}" for name in ("nll_err", "dX_err", "dW_err"))
        verdicts = sorted({row["verdict"] or row["note"] for row in found})
        yield f"{size} {form}: {'; '.join(cells)}; worst {errors}; {', '.join(verdicts)}"


def _size(row: dict[str, str]) -> str:
    return f"N={row['N']} D={row['D']} {row['case'].replace(' logits', '')}"


def _form(row: dict[str, str]) -> str:
    return row["gemm"] + row["provider"].removeprefix("vrpo")


def _time(row: dict[str, str]) -> str:
    if not row["ms_p50"]:
        return "-"
    return f"{float(row['ms_p50']):.2f} ms {row['pct_of_gemm']} % ({row['pct_p20']} to {row['pct_p80']})"


def tiles(rows: list[dict[str, str]]) -> Iterator[str]:
    """The fastest correct shapes per size, mode and provider."""
    good = [row for row in rows if row["ms_p50"] and row["op"] != "mm" and row["verdict"] != "RED"]

    def key(row: dict[str, str]) -> tuple[str, str, str]:
        return row["N"], row["mode"], row["provider"]

    names = ("rows", "cols", "first_cols", "fold_cols", "block_rows", "block_cols", "block_hidden")
    names += ("num_warps", "num_stages")
    for (size, mode, provider), group in groupby(sorted(good, key=key), key=key):
        for row in sorted(group, key=lambda row: float(row["ms_p50"]))[:BEST]:
            shape = " ".join(f"{name}={row[name]}" for name in names if row[name])
            yield f"N={size} {mode}, {provider}: {_time(row)} {shape}"


def memory(rows: list[dict[str, str]]) -> Iterator[str]:
    """One line per row."""
    for row in rows:
        speed = f"{row['GB_per_s']} GB/s, {row['pct_of_copy']} % of a copy"
        positions = f", {row['Gpositions_per_s']} Gpositions/s" if row["Gpositions_per_s"] else ""
        time = f"{float(row['ms_p50']):.4f} ms, {speed}{positions}" if row["ms_p50"] else row["note"]
        yield f"{row['op']} {row['mode']} {row['case']}: {time}"


def digest(folder: Path) -> Iterator[str]:
    """Lines of all files that are there. Rows of earlier runs in the same folder are among them."""
    for name, lines in (("kernels", kernels), ("tiles", tiles), ("memory", memory)):
        rows = _rows(folder / f"{name}.csv")
        failed = [row for row in rows if row.get("note")]
        yield from lines(rows)
        for row in failed:
            shown = (row[key] for key in ("op", "provider", "mode", "N", "case", "note") if row.get(key))
            yield f"{name}: not measured: {' '.join(shown)}"


def main(arguments: list[str]) -> int:
    """Prints the digest of a folder."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parent / "results" / "gpu"
    print(*digest(folder), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
