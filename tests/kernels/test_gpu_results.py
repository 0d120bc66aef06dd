"""What `make gpu` makes of what it found: the sanitizer's verdict, the summary, the digest, the tables."""

import argparse

import pytest

from benchmarks import gpu, gpu_kernels, gpu_memory, gpu_table, gpu_tiles
from benchmarks.bench_linear_cross_entropy import FIELDS as RIVAL_FIELDS
from benchmarks.bench_linear_cross_entropy import NO_TIME
from benchmarks.gpu_bench import PROVENANCE
from benchmarks.gpu_digest import digest
from benchmarks.gpu_findings import read_findings
from benchmarks.gpu_reached import SHOWN, counts_of_tests, not_reached
from benchmarks.gpu_stages import DEFAULT
from benchmarks.gpu_table import main as print_tables
from benchmarks.gpu_table import tables
from benchmarks.record import append
from benchmarks.step_run import FIELDS as STEP_FIELDS

PARTS = ("fused", "masks")
RIGHT = [f"{part}: ok; error over what is allowed: nll 0.1" for part in PARTS]
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at {kernel}+0xb00
=========     and Write access at {kernel}+0x2840 [128 hazards]
=========
fused: ok; error over what is allowed: nll 0.1
========= Error: Race reported between Read access at {kernel}+0xb00
=========     and Write access at {kernel}+0x2840 [96 hazards]
========= """
FAULT = """========= Invalid __global__ write of size 4 bytes
=========     at {kernel}+0x1f0
=========     by thread (1,0,0) in block (0,0,0)
=========     Address 0x7f is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cublasLtMatmul [0x1f] in libcublasLt.so
=========
========= ERROR SUMMARY: 1 error"""
IDENTITY = {"date": "2026-11-26T16:40:45+00:00", "git": "abc1234", "device": "a GPU", "torch": "2.11.0"}
SHAPE = {"N": 7, "D": 5, "V": 11}


def races(kernel, count):
    summary = f"========= RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)"
    return [*RACE.format(kernel=kernel).splitlines(), *RIGHT, summary]


def test_findings__inside_the_library_are_counted_and_set_aside():
    found = read_findings(races("nvjet_sm90_tss_64x8_h_bz_NNT", 2), set_aside=True)
    words, failed = found.verdict(9, PARTS)
    assert not failed and words.endswith("set aside inside cuBLAS: 2 in nvjet_sm90_tss_64x8_h_bz_NNT")
    clean = [*RIGHT, "========= ERROR SUMMARY: 0 errors"]
    assert read_findings(clean, set_aside=False).verdict(0, PARTS) == ("ok, no finding", False)


def test_findings__in_our_kernels_or_unexplained_fail():
    for lines, set_aside in (
        (races("_fold_kernel", 2), True),
        (races("nvjet_sm90_tss_64x8_h_bz_NNT", 2), False),
        (races("nvjet_sm90_tss_64x8_h_bz_NNT", 3), True),  # one that was not understood
        (races("nvjet_sm90_tss_64x8_h_bz_NNT", 2)[:-1], True),
        ([*RIGHT, *FAULT.format(kernel="_fold_kernel").splitlines()], False),
        ([*RIGHT, *FAULT.format(kernel="nvjet_sm90_tss").splitlines()], False),
        ([*RIGHT, "========= Program hit cudaErrorIllegalAddress", "=========  at 0x7f in libcuda.so"], True),
        (RIGHT, True),
    ):
        assert read_findings(lines, set_aside=set_aside).verdict(9, PARTS)[1], lines


def test_findings__a_wrong_or_missing_part_fails():
    for lines in ([RIGHT[0]], [RIGHT[0], "masks: WRONG; error over what is allowed: nll 2"]):
        found = read_findings([*lines, "========= ERROR SUMMARY: 0 errors"], set_aside=True)
        assert found.verdict(1, PARTS) == ("exit status 1; not right or not reached: masks", True)


def test_findings__of_a_run_that_was_cut_are_those_so_far():
    kernel, why = "nvjet_sm90_tss_64x8_h_bz_NNT", "stopped at its limit of 52 s"
    found = read_findings(RACE.format(kernel=kernel).splitlines(), set_aside=True)
    words = f"{why}; findings so far: 0 in our kernels, 2 in {kernel}; parts reached: fused"
    assert found.cut(why, PARTS) == (words, True)
    found = read_findings([*races("_fold_kernel", 2)[:-1], "masks: WRONG; nll 2"], set_aside=True)
    words, failed = found.cut(why, PARTS)
    assert failed and "2 in our kernels (Error: Race reported between" in words
    assert words.endswith("parts reached: fused, masks; WRONG: masks")
    assert read_findings([], set_aside=True).cut(why, PARTS)[0].endswith("parts reached: none")


def test_not_reached__names_the_first_and_counts_the_others():
    names = [f"row {number}" for number in range(SHOWN + 3)]
    (line,) = not_reached(["plan: " + " | ".join(names), "something else", "done: row 0"])
    assert line == f"not reached, {SHOWN + 2} of {SHOWN + 3}: {'; '.join(names[1 : SHOWN + 1])}; and 2 more"
    assert not_reached(["plan: "]) == []
    assert not_reached(["imports"]) == ["nothing reached: it ended before it had a work list"]


def test_summary__counts_the_tests_that_ended_before_a_stop():
    ended = ["[gw0] [ 50%] PASSED tests/a.py::test_b[1 2] ", "[gw1] [ 75%] FAILED tests/a.py::test_c "]
    lines = ["7 workers [4 items]", "tests/a.py::test_b[1 2] ", *ended, "tests/a.py::test_d "]
    expected = ["1 failed, 1 passed; 2 of 4 not reached", "failed: tests/a.py::test_c"]
    assert counts_of_tests(lines) == expected
    alone = ["tests/a.py::test_b[1 2] PASSED      [ 50%]", "tests/a.py::test_c FAILED [ 75%]"]
    assert counts_of_tests(["collected 9 items / 5 deselected / 4 selected", *alone]) == expected
    assert counts_of_tests(["collected 4 items"]) == ["none ended; 4 of 4 not reached"]


def test_summary__names_what_failed_without_messages_and_paths(tmp_path):
    lines = [
        "collected 9 items",
        "FAILED tests/a.py::test_b[1] - OSError: /somewhere/else",
        "ERROR tests/c.py",
    ]
    lines += ["PASSED tests/a.py::test_c", "===== 1 failed, 8 passed, 1 error in 3.20s ====="]
    kept = counts_of_tests(lines)
    assert kept[0] == "1 failed, 8 passed, 1 error in 3.20s"
    assert kept[1:] == ["failed: tests/a.py::test_b[1]", "failed: tests/c.py"]
    options = {"output": tmp_path, "seconds": 9.0, "stages": list(DEFAULT), "revision": "abc1234"}
    session = gpu.Session(argparse.Namespace(**options, rivals=[], tiny=True, least=0.1))
    session.lines.append(gpu.Line("tests", 3.0, "exit status 1", True, tuple(kept)))
    assert session.finish(["torch 2.11.0"]) == 1
    text = (tmp_path / "summary.txt").read_text()
    assert "git abc1234\ntorch 2.11.0\n" in text and "failed: tests/a.py::test_b[1]" in text


def kernel_rows(folder):
    """kernels.csv with both forms of two modes, one of them not measured."""
    row = {
        **IDENTITY,
        "op": "linear_cross_entropy",
        "provider": "vrpo",
        "dtype": "bf16",
        "case": "random logits",
    }
    row |= {**SHAPE, "verdict": "ok", "nll_err": "2e-05"}
    times = {
        "ms_p50": "1.5000",
        "pct_of_gemm": "83.0",
        "pct_p20": "82.0",
        "pct_p80": "84.4",
        "peak_MiB": "4.1",
    }
    good = {**row, "mode": "frozen head", "gemm": "fused", **times}
    other = {**good, "gemm": "cublas", "ms_p50": "1.6000", "peak_MiB": "512.0"}
    bad = {**row, "mode": "no gradient", "gemm": "fused", "note": "OutOfMemoryError: none left"}
    host = {**good, "provider": "vrpo, host included", "ms_p50": "2.5000", "host_ms": "1.2000"}
    fields = (*PROVENANCE, *gpu_kernels.FIELDS)
    append([good, bad, other, host], folder / "kernels.csv", fields)


def test_digest__shows_what_was_measured_and_what_was_not(tmp_path):
    kernel_rows(tmp_path)
    lines = list(digest(tmp_path))
    assert "fused: frozen head 1.50 ms 83.0 % (82.0 to 84.4); no gradient -; worst nll_err 2e-05" in lines[0]
    assert "not measured" in lines[-1] and "OutOfMemoryError: none left" in lines[-1]


def test_tables__of_kernels_show_both_forms_and_where_they_come_from(tmp_path):
    kernel_rows(tmp_path)
    text = "\n".join(tables(tmp_path))
    assert "bf16, form `fused` (a GPU, 2026-11-26, git abc1234, torch 2.11.0):" in text
    assert "| 7, 5 x 11 | frozen head | 1.50 | 83 (82..84) | 4 | 2.0e-05 | 1.60 | 83 (82..84) | 512 |" in text
    assert "| 7, 5 x 11 | frozen head | 2.50 | 83 (82..84) | 1.20 |" in text
    assert "no gradient" not in text


def test_tables__of_rivals_show_figures_or_the_reason(tmp_path):
    row = {**IDENTITY, "dtype": "bf16", **SHAPE, "ms_p50": "6.34", "units_p50": "1.18", "peak_MiB": "512"}
    ours = {**row, "provider": "vrpo", "nll_error": "1.8e-05", "policy_ratio": "0.76"}
    eager = {**row, "provider": "torch eager", "column": "frozen head", "nll_error": "1e-2"}
    eager |= {"policy_ratio": "480", "note": "outside the tolerance policy: nll 480"}
    missing = {**IDENTITY, **SHAPE, "provider": "quack, sum only", "note": "package quack is not installed"}
    rows = [{**ours, "column": column} for column in ("no gradient", "frozen head", "trained head")]
    smaller = {**ours, "column": "no gradient", "N": 3, "ms_p50": "3.21"}
    append([*rows, eager, missing, smaller], tmp_path / "rivals.csv", RIVAL_FIELDS)
    text = "\n".join(tables(tmp_path))
    assert "N = 7, D = 5, V = 11, bf16 (a GPU" in text
    assert "| vrpo | 3.21 (1.18) |" in text.split("N = 3, D = 5, V = 11, bf16 (a GPU")[1]
    cell = "6.34 (1.18) | 512"
    assert f"| vrpo | {cell} | {cell} | {cell} | 1.8e-05 | within the policy |" in text
    assert f"| torch eager | - | - | {cell} | - | - | 1e-2 | outside the tolerance policy by 480x |" in text
    assert "| quack, sum only | - | - | - | - | - | - | - | package quack is not installed |" in text


def test_tables__of_rivals_keep_heads_apart(tmp_path):
    row = {**IDENTITY, "dtype": "bf16", **SHAPE, "provider": "vrpo", "column": "no gradient"}
    row |= {"units_p50": "1.18", "nll_error": "1.8e-05", "policy_ratio": "0.76"}
    capped = {**row, "head": "softcap", "ms_p50": "7.25"}
    append([{**row, "head": "plain", "ms_p50": "6.34"}, capped], tmp_path / "rivals.csv", RIVAL_FIELDS)
    plain, other = "\n".join(tables(tmp_path)).split("head with softcap")
    assert "| vrpo | 6.34 (1.18) |" in plain and "7.25" not in plain
    assert "| vrpo | 7.25 (1.18) |" in other and "6.34" not in other


def test_tables__leave_out_what_was_not_reached(tmp_path):
    row = {**IDENTITY, "dtype": "bf16", **SHAPE, "provider": "torch.compile", "note": NO_TIME}
    assert gpu_table.NO_TIME == NO_TIME
    append([row], tmp_path / "rivals.csv", RIVAL_FIELDS)
    assert list(tables(tmp_path)) == []
    timed = {**row, "provider": "vrpo", "column": "no gradient", "note": "", "policy_ratio": "0.5"}
    append([{**timed, "ms_p50": "6.34", "units_p50": "1.18"}], tmp_path / "rivals.csv", RIVAL_FIELDS)
    text = "\n".join(tables(tmp_path))
    assert "| vrpo | 6.34 (1.18) |" in text and "torch.compile" not in text
    cut = {**timed, "N": 99, "ms_p50": "27.90", "units_p50": "5.01", "reps": 1}
    append([cut], tmp_path / "rivals.csv", RIVAL_FIELDS)
    assert "\n".join(tables(tmp_path)) == text


def test_tables__at_the_power_limit_compare_time_and_energy(tmp_path):
    row = {**IDENTITY, **SHAPE, "case": "random logits", "watt": "690", "sm_mhz": "1400"}
    unit = {**row, "provider": "bare GEMM, sustained", "units": 1, "ms_p50": "6.0", "joule": "4.5"}
    ours = {
        **row,
        "provider": "vrpo, sustained",
        "mode": "frozen head",
        "units": 2,
        "ms_p50": "15",
        "joule": "10",
    }
    other = {
        **row,
        "provider": "vrpo",
        "mode": "frozen head",
        "gemm": "fused",
        "ms_p50": "13",
        "dtype": "bf16",
    }
    append([unit, ours, other], tmp_path / "kernels.csv", (*PROVENANCE, *gpu_kernels.FIELDS))
    text = "\n".join(tables(tmp_path))
    assert "| 7, 5 x 11 | frozen head | 15.00 | 10.00 | 690 | 1400 | 80 | 90 |" in text
    assert "| 7, 5 x 11 | bare GEMM | 6.00 | 4.50 | 690 | 1400 | 100 | 100 |" in text
    rows = [row | {"joule": "", "watt": "", "sm_mhz": "", "git": "def5678"} for row in (unit, ours, other)]
    append(rows, tmp_path / "kernels.csv", (*PROVENANCE, *gpu_kernels.FIELDS))
    assert "| 7, 5 x 11 | frozen head | 15.00 | - | - | - | 80 | - |" in "\n".join(tables(tmp_path))


def test_tables__of_tiles_show_the_fastest_right_shapes(tmp_path):
    row = {**IDENTITY, **SHAPE, "case": "random logits", "provider": "vrpo fused", "verdict": "ok"}
    row |= {"mode": "sweep", "rows": 64, "peak_MiB": "4", "pct_of_gemm": "83"}
    row |= {"block_rows": 16, "block_cols": 32, "block_hidden": 8, "num_stages": 3}
    times = [7.0, 1.0, 6.0, 5.0, 4.0, 3.0, 2.0]
    rows = [{**row, "cols": 100 + n, "ms_p50": f"{time:.4f}"} for n, time in enumerate(times)]
    rows[1]["verdict"] = "RED"
    rows.append({**row, "cols": 200, "note": "OutOfResources"})
    append(rows, tmp_path / "tiles.csv", (*PROVENANCE, *gpu_tiles.FIELDS))
    lines = [line for line in tables(tmp_path) if line.startswith("| 7, 5 x 11 |")]
    assert [line.split("64 x ")[1].split(",")[0] for line in lines] == ["106", "105", "104", "103", "102"]
    shape = "64 x 106, blocks 16 x 32 x 8, `num_stages` 3"
    assert lines[0] == f"| 7, 5 x 11 | sweep | fused | {shape} | 2.00 | 83 | 4 |"


def test_tables__of_two_revisions_are_two_in_one_folder_or_in_several(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        kernel_rows(folder)
    path = second / "kernels.csv"
    path.write_text(path.read_text().replace("abc1234", "def5678").replace("1.5000", "1.2500"))
    text = "\n".join(tables(first, second))
    assert text.count("### kernels") == 1
    assert text.index("git abc1234") < text.index("| frozen head | 1.50 |") < text.index("git def5678")
    assert text.index("git def5678") < text.index("| frozen head | 1.25 |")
    with (first / "kernels.csv").open("a") as stream:
        stream.writelines(path.read_text().splitlines(keepends=True)[1:])
    assert "\n".join(tables(first)) == text


def test_tables__of_steps_compare_variants_with_as_many_tokens(tmp_path):
    row = {
        **IDENTITY,
        "transformers": "5.17.0",
        "tokens_per_s": "5553",
        "tflops": "329",
        "pct_of_gemm": "41.3",
    }
    row |= {"peak_GiB": "24.17"}
    known = {"case": "LoRA", "K": 8, "T": 64, "ms": "2000"}
    variant = {"case": "LoRA, sdpa", "K": 4, "T": 64, "ms": "1900", "note": "1 timed"}
    append([{**row, **known}, {**row, **variant}], tmp_path / "step.csv", STEP_FIELDS)
    text = "\n".join(tables(tmp_path))
    assert "transformers 5.17.0):" in text
    assert "| LoRA | 8 | 2000 | 5553 | 329 | 41.3 | 24.2 |" in text
    assert "| LoRA, sdpa | 4 | 1900 | 5553 | 329 | 41.3 | 24.2 | 0.950 | 1 timed |" in text


def test_tables__of_memory_and_of_an_empty_folder(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        print_tables([str(tmp_path)])
    assert "kernels.csv" in capsys.readouterr().err
    row = {
        **IDENTITY,
        "op": "mask_select",
        "mode": "by rank",
        "case": "64 segments of 512",
        "ms_p50": "0.0181",
    }
    row |= {"GB_per_s": "7.4", "pct_of_copy": "0.2", "Gpositions_per_s": "1.81"}
    append([row], tmp_path / "memory.csv", (*PROVENANCE, *gpu_memory.FIELDS))
    assert print_tables([str(tmp_path)]) == 0
    expected = "| `mask_select`, by rank | 64 segments of 512 | 0.018 | 7 | 0.2 | 1.81 |"
    assert expected in capsys.readouterr().out


def test_read__leaves_out_a_row_cut_in_the_middle(tmp_path):
    (tmp_path / "memory.csv").write_text("a,b,c\n1,2,3\n4,5")
    assert gpu_table.read(tmp_path / "memory.csv") == [{"a": "1", "b": "2", "c": "3"}]
