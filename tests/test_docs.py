"""README.md and docs/: links lead somewhere, and tables and figures are those of the committed files."""

import csv
import re
from pathlib import Path

import pytest

from benchmarks.pages import command, cpu
from benchmarks.pages.tables import tables_of

ROOT = Path(__file__).parent.parent
PAGES = command.PAGES
RESULTS = ROOT / "benchmarks/results/gpu"
KERNELS, ALL_RIVALS = (RESULTS / f"h100-2026-11-27{part}" for part in ("", "-first"))


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def cells_of(page):
    """The cells of every line of a table, without bold marks."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            yield [cell.strip().replace("*", "") for cell in line.split("|")[1:-1]]


def assert_rounded(text, figure):
    """text is figure to as many decimals as text has, a half rounded either way."""
    decimals = len(text.partition(".")[2])
    assert abs(float(text) - float(figure)) <= 0.5001 * 10**-decimals, (text, figure)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links__lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages__tables_and_figures_are_those_of_the_result_files(page):
    made, unmarked = command.looked_at(page)
    assert not [f"{page.name}:{found.line}: {found.text}" for found in made.errors + made.changes + unmarked]


def test_pages__have_the_tables_that_their_text_speaks_of():
    named = {page.name: set(re.findall(r"<!-- table: (\S+) -->", page.read_text("utf-8"))) for page in PAGES}
    assert {"variance.summary", "gpu.rivals-4096", "gpu.steps", "cpu.eos-fill"} <= named["README.md"]
    assert {"quickstart.outcome"} <= named["README.md"]
    assert {"gpu.head", "gpu.sustained", "gpu.lora-steps", "gpu.rivals-4096", "gpu.best"} <= named["gpu.md"]
    assert {"gpu.all"} <= named["gpu-results.md"]
    assert {f"scaling.{name}" for name in ("steps", "replay", "gpus", "knobs", "experts")} == named[
        "scaling.md"
    ]
    assert {f"cpu.{name}" for name in tables_of("cpu")} - {"cpu.eos-fill"} == named["cpu.md"]
    elsewhere = {"variance.summary", "variance.loss-8"}
    assert {f"variance.{name}" for name in tables_of("variance")} - elsewhere == named["mask-designs.md"]


def test_cpu_tables__need_one_row_for_a_cell():
    rows = rows_of(ROOT / "benchmarks/results/kernels.csv")
    told = cpu.heads(rows, cpu.ZEN5)
    ours = next(line for line in told.splitlines() if "vrpo" in line)
    row = next(
        row
        for row in rows
        if (row["git"], row["dtype"], row["threads"], row["provider"], row["column"])
        == ("78914c0", "bf16", "2", "vrpo", "trained head")
    )
    assert ours.split("|")[5].strip(" *").split(", ")[2] == f"{float(row['units_p50']):.2f}"
    with pytest.raises(ValueError, match="needs one row"):
        cpu.heads([*rows, row], cpu.ZEN5)
    slower = [{**r, "units_p50": "9.00"} if r is row else r for r in rows]
    best = cpu.best(slower, {"this": cpu.ZEN5["bf16, 2 threads"]}).splitlines()[2]
    assert "0.84, 1.63, 9.00" in best and best.split("|")[4].split(", ")[2].strip() == f"{3.34 / 9:.2f}"


def test_gpu_page__best_of_the_others_is_the_least_of_each_column():
    rows = [row for row in rows_of(ALL_RIVALS / "rivals.csv") if (row["N"], row["head"]) == ("512", "plain")]
    (cells,) = (c for c in cells_of(ROOT / "docs/gpu.md") if c[0] == "4fd4141, N = 512")
    found = list(zip(*(cell.split(", ") for cell in cells[1:]), strict=True))
    for column, (mine, others, ratio) in zip(
        ("no gradient", "frozen head", "trained head"), found, strict=True
    ):
        units = {
            r["provider"]: float(r["units_p50"]) for r in rows if r["column"] == column and r["units_p50"]
        }
        least = min(value for name, value in units.items() if "vrpo" not in name)
        assert_rounded(mine, units["vrpo"])
        assert_rounded(others, least)
        assert_rounded(ratio, least / units["vrpo"])


def test_readme__rivals_have_the_measured_figures():
    names = {"vrpo": "vrpo", "TRL, chunk 32768": "TRL chunked, chunk 32768", "eager": "torch eager"}
    names |= {name: name for name in ("vrpo, tiles recomputed", "Liger", "CCE, exact", "torch.compile")}
    plain = [
        row for row in rows_of(ALL_RIVALS / "rivals.csv") if (row["N"], row["head"]) == ("4096", "plain")
    ]
    rows = {(row["provider"], row["column"]): row for row in plain}
    found = [
        cells for cells in cells_of(PAGES[0]) if len(cells) == 5 and cells[0] in names and "(" in cells[1]
    ]
    assert len(found) == len(names)
    for name, *columns, error in found:
        for column, cell in zip(("no gradient", "frozen head", "trained head"), columns, strict=True):
            row = rows[names[name], column]
            milliseconds, units, peak = re.fullmatch(r"([\d.]+) \(([\d.]+)\), (\d+)", cell).groups()
            assert_rounded(milliseconds, row["ms_p50"])
            assert_rounded(units, row["units_p50"])
            assert_rounded(peak, row["peak_MiB"])
            assert f"{float(row['nll_error']):.1e}" == f"{float(error):.1e}"


def test_readme__step_has_the_measured_figures():
    names = {"LoRA r = 16": "LoRA", "all weights, no optimizer state": "full"}
    rows = {(row["case"], row["K"]): row for row in rows_of(ALL_RIVALS / "step.csv")}
    found = [cells for cells in cells_of(PAGES[0]) if len(cells) == 6 and cells[0] in names]
    assert len(found) == 4
    for name, samples, *figures in found:
        row = rows[names[name], samples]
        for key, figure in zip(("ms", "tokens_per_s", "pct_of_gemm", "peak_GiB"), figures, strict=True):
            assert_rounded(figure, row[key])


def test_gpu_page__head_at_the_power_limit_has_the_measured_figures():
    names = {"bare product": "", "no gradient": "no gradient", "frozen head": "frozen head"}
    names |= {"trained, tiles kept": "trained, tiles kept"}
    rows = {row["mode"]: row for row in rows_of(KERNELS / "kernels.csv") if row["joule"]}
    found = [cells for cells in cells_of(ROOT / "docs/gpu.md") if len(cells) == 5 and cells[0] in names]
    assert len(found) == len(names)
    for name, *figures, share in found:
        row = rows[names[name]]
        for key, figure in zip(("ms_p50", "joule", "sm_mhz"), figures, strict=True):
            assert_rounded(figure, row[key])
        assert_rounded(share, 100 * float(row["units"]) * float(rows[""]["ms_p50"]) / float(row["ms_p50"]))


def test_gpu_page__head_has_the_measured_figures():
    rows = {
        (row["N"], row["mode"]): row
        for row in rows_of(KERNELS / "kernels.csv")
        if (row["provider"], row["gemm"], row["D"], row["case"]) == ("vrpo", "fused", "4096", "random logits")
    }
    found = [cells for cells in cells_of(ROOT / "docs/gpu.md") if len(cells) == 7 and cells[0].isdigit()]
    assert len(found) == 5
    for size, *cells in found:
        for mode, cell in zip(("no gradient", "frozen head", "trained, tiles kept"), cells[::2], strict=True):
            milliseconds, share = re.fullmatch(r"([\d.]+) \((\d+) %\)", cell).groups()
            assert_rounded(milliseconds, rows[size, mode]["ms_p50"])
            assert_rounded(share, rows[size, mode]["pct_of_gemm"])
