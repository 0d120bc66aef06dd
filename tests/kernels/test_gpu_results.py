"""What `make gpu` makes of what it found: the sanitizer's verdict, the summary, the digest, the tables."""

import argparse

from benchmarks import gpu, gpu_kernels, gpu_memory
from benchmarks.bench_linear_cross_entropy import FIELDS as RIVAL_FIELDS
from benchmarks.gpu_bench import PROVENANCE
from benchmarks.gpu_digest import digest
from benchmarks.gpu_findings import read_findings
from benchmarks.gpu_stages import DEFAULT, counts_of_tests
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
    append([*rows, eager, missing, {**ours, "N": 3}], tmp_path / "rivals.csv", RIVAL_FIELDS)
    text = "\n".join(tables(tmp_path))
    assert "N = 7, D = 5, V = 11, bf16 (a GPU" in text
    cell = "6.34 (1.18) | 512"
    assert f"| vrpo | {cell} | {cell} | {cell} | 1.8e-05 | within the policy |" in text
    assert f"| torch eager | - | - | {cell} | - | - | 1e-2 | outside the tolerance policy by 480x |" in text
    assert "| quack, sum only | - | - | - | - | - | - | - | package quack is not installed |" in text


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
    assert print_tables([str(tmp_path)]) == 1
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
