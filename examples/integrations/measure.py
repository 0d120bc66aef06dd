"""python -m examples.integrations.measure: time and memory of every drop-in on a CPU toy, as a table.

The same loss and gradients twice: by the drop-in, and by the codebase's formula on all logits (formulas.py),
in turns, on one thread. The toy is little more than its head, so the ratios are those of the head; of a whole
model's step it is a part. LLaDA's likelihood takes no gradients, here neither.

`--record` writes results.csv beside this file, and from it the table in README.md and the figure in each
drop-in's docstring.
"""

import argparse
import csv
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.record import provenance
from benchmarks.timing import interleaved
from examples.integrations.cases import Batch, Case, cases
from examples.integrations.toy import Toy

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.csv"
MEASURED = ("ms_ours", "ms_all_logits", "MiB_ours", "MiB_all_logits")


def measured_cases(batch: Batch) -> dict[str, Case]:
    """Module name -> its first case."""
    found: dict[str, Case] = {}
    for case in cases(batch):
        found.setdefault(case.name.split(",")[0], case)
    return found


def one_pass(compute: Callable[[nn.Module], Tensor], model: nn.Module, gradients: bool) -> Callable[[], None]:
    """A call of the forward pass and, with gradients, of the backward pass to all weights."""

    def run() -> None:
        if not gradients:
            with torch.no_grad():
                compute(model)
            return
        torch.autograd.grad(compute(model).sum(), list(model.parameters()))

    return run


def measure(size: int, length: int, vocab_size: int, hidden_size: int, repeats: int) -> Iterable[dict]:
    """One row for each drop-in."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Toy(vocab_size, hidden_size)
    facts = provenance("cpu") | {"B": size, "L": length, "V": vocab_size, "D": hidden_size}
    for name, case in measured_cases(Batch(size, length, vocab_size, torch.float32)).items():
        gradients = name != "llada"
        runs = {kind: one_pass(getattr(case, kind), model, gradients) for kind in ("ours", "all_logits")}
        timings = interleaved(runs, device="cpu", threads=1, repeats=repeats)
        row = facts | {
            "name": name,
            "mode": "forward + backward" if gradients else "forward",
            "dtype": "float32",
            "threads": 1,
            "repeats": repeats,
        }
        for kind, timing in timings.items():
            row[f"ms_{kind}"] = f"{timing.quantile(0.5):.1f}"
            row[f"MiB_{kind}"] = "" if timing.peak_mib is None else f"{timing.peak_mib:.0f}"
        yield row


def ratio(row: Mapping[str, str]) -> str:
    return f"{float(row['ms_all_logits']) / float(row['ms_ours']):.1f}"


def figure(row: Mapping[str, str]) -> str:
    """The line of a drop-in's docstring."""
    return (
        f"CPU toy, {row['mode']}: {ratio(row)} times as fast, "
        f"{row['MiB_ours']} instead of {row['MiB_all_logits']} MiB (results.csv)."
    )


def table(rows: list[Mapping[str, str]]) -> str:
    """Markdown: one line for each drop-in, and what it was measured on."""
    lines = ["| drop-in | pass | ms | ms, all logits | times as fast | MiB | MiB, all logits |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = (row["ms_ours"], row["ms_all_logits"], ratio(row), row["MiB_ours"], row["MiB_all_logits"])
        lines.append(f"| [{row['name']}]({row['name']}.py) | {row['mode']} | " + " | ".join(cells) + " |")
    first = rows[0]
    lines.append("")
    lines.append(
        f"Measured on a **CPU toy**: {first['device']}, one thread, {first['dtype']}, B = {first['B']}, "
        f"L = {first['L']}, V = {first['V']}, D = {first['D']}, median of {first['repeats']} interleaved "
        f"calls, torch {first['torch']}, {first['date'][:10]}. MiB: growth of the process during one call, "
        "gradients of all weights included."
    )
    return "\n".join(lines)


def read() -> list[dict[str, str]]:
    with RESULTS.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def record(rows: list[dict]) -> None:
    """results.csv, and the places that quote it."""
    with RESULTS.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    stored = read()
    readme = FOLDER / "README.md"
    before = readme.read_text(encoding="utf-8").partition("| drop-in |")[0]
    readme.write_text(before + table(stored) + "\n", encoding="utf-8")
    for row in stored:
        path = FOLDER / f"{row['name']}.py"
        text = re.sub(r"^(CPU toy|FIGURES).*$", figure(row), path.read_text(encoding="utf-8"), flags=re.M)
        path.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write results.csv and what quotes it")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that it runs, and no more")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    if options.tiny and options.record:
        parser.error("--tiny measures nothing worth recording")
    sizes = (2, 16, 64, 8) if options.tiny else (8, 128, 16384, 256)
    rows = list(measure(*sizes, 1 if options.tiny else options.repeats))
    if options.record:
        record(rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
