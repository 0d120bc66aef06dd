"""`python -m benchmarks model`: waves by hand, launches against a profile, what was measured beside it."""

import importlib.util
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_model
from benchmarks.gpu_model import DEVICES, EPILOGUE_PS, LAUNCH_US, MODES, Head, Model
from benchmarks.record import RESULTS
from vrpo_kernels.linear_cross_entropy.tiles import tiles_for

H100 = DEVICES["H100"]
LLADA = Head(4096, 4096, 126464)
# The tiles of the profile in results/gpu/h100-2026-11-26, whatever is in force now.
PROFILED = replace(
    tiles_for((9, 0), 2, "fused"),
    rows=4096,
    cols=32768,
    first_cols=8192,
    sweep_rows=8192,
    sweep_cols=8192,
    max_cols=131072,
    block_rows=128,
    block_cols=256,
)
NOT_MODELLED = ("Memset", "Memcpy", "at::native")  # fills and the drift's reduction: microseconds


def profiled_launches(mode, form):
    """Kernel launches of one section of the committed profile, fills left out."""
    text = (RESULTS / "gpu" / "h100-2026-11-26" / "profile.txt").read_text()
    (section,) = [part for part in text.split("\n\n") if part.startswith(f"{mode}, {form}, N=4096")]
    found = re.findall(r"^ +[\d.]+ ms +(\d+) x +(.+)$", section, re.MULTILINE)
    return sum(int(count) for count, name in found if not any(part in name for part in NOT_MODELLED))


@pytest.mark.parametrize("form", ["fused", "cublas"])
@pytest.mark.parametrize("mode", list(MODES))
def test_launches__are_those_of_the_profile(mode, form):
    model = Model(H100, LLADA, tiles=replace(PROFILED, gemm=form))
    assert len(model.launches(mode)) == profiled_launches(mode, form)


class Recording(Model):
    """Notes rows, columns and K of every product."""

    def __init__(self, *args):
        super().__init__(*args)
        self.products = []

    def _product(self, rows, cols, inner, *, out_bytes):
        self.products.append((rows, cols, inner))
        return 0.0

    def _fused(self, rows, cols, *, store):
        self.products.append((rows, cols, self.head.hidden))
        return 0.0


def backend_products(monkeypatch, head, form, sweep):
    """The same of the Triton backend's loops, on tensors without memory."""
    from vrpo_kernels.linear_cross_entropy import kernel_forward, kernel_sweep
    from vrpo_kernels.linear_cross_entropy.kernel_head import Head as KernelHead

    found = []

    def product(a, b, out, **_):
        found.append((a.shape[0], b.shape[1], a.shape[1]))

    def fused(hidden, *_, num_cols, **__):
        found.append((hidden.shape[0], num_cols, hidden.shape[1]))

    for module in (kernel_forward, kernel_sweep):
        monkeypatch.setattr(module, "device_facts", lambda device: ((9, 0), 132))
        monkeypatch.setattr(module, "product", product)
    monkeypatch.setattr(kernel_sweep, "rounded_product", product)
    for module, name in (
        (kernel_forward.kernel_gemm, "logits_fold"),
        (kernel_forward.kernel_gemm, "probabilities"),
    ):
        monkeypatch.setattr(module, name, fused)
    for module, name in (
        (kernel_forward.kernel_fold, "fold"),
        (kernel_forward.kernel_fold, "fold_blocks"),
        (kernel_sweep.kernel_known, "probabilities"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: None)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    half = torch.bfloat16
    hidden, weight = empty(head.rows, head.hidden, dtype=half), empty(head.classes, head.hidden, dtype=half)
    shared = (hidden, KernelHead(weight, None, 0.0, 1.0), empty(head.rows, dtype=torch.int64))
    expected, statistics, nothing = empty(head.rows, head.hidden), empty(3, head.rows), empty(0, 0)
    tiles = tiles_for((9, 0), 2, form)
    if sweep:
        kernel_sweep.sweep_tiles(*shared, statistics, expected, hidden, weight, empty(0), empty(0), tiles)
    else:
        kernel_forward.forward_tiles(*shared, statistics, expected, nothing, nothing, tiles)
    return found


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package `triton` is not installed"
)
@pytest.mark.parametrize("form", ["fused", "cublas"])
@pytest.mark.parametrize("rows", [100, 512, 4096, 4100, 16384])
@pytest.mark.parametrize("sweep", [False, True])
def test_products__are_those_of_the_backend_with_the_tiles_in_force(monkeypatch, sweep, rows, form):
    head = Head(rows, 4096, 126464)
    model = Recording(H100, head, form)
    list(model._sweep() if sweep else model._forward(want_dhidden=True, store=True))
    assert model.products == backend_products(monkeypatch, head, form, sweep) and len(model.products) >= 2


def test_unit__counts_waves_by_hand():
    # 32 x 494 blocks of 128 x 256 are 119.76 waves of 132 SMs and take as long as 120.
    block_ms = 2 * 128 * 256 * 4096 / (786e12 / 132) * 1e3
    assert Model(H100, LLADA).unit_ms() == pytest.approx(120 * block_ms + LAUNCH_US / 1e3, rel=1e-12)


def test_fused__one_block_more_than_a_wave_costs_a_wave():
    model = Model(H100, Head(512, 4096, 34 * 256), tiles=PROFILED)  # 4 row blocks, 33 column blocks a wave
    one_wave, two_waves = (model._fused(512, blocks * 256, store=False) for blocks in (33, 34))
    assert two_waves == pytest.approx(2 * one_wave, rel=1e-12)
    block_ms = 2 * 128 * 256 * 4096 / (786e12 / 132) * 1e3
    assert one_wave == pytest.approx(block_ms + 128 * 256 * EPILOGUE_PS * 1e-9, rel=1e-12)


def test_fused__many_rows_meet_the_power_limit():
    few, many = (Model(H100, Head(rows, 4096, 126464), tiles=PROFILED) for rows in (1024, 4096))
    assert many.percent("no gradient") < few.percent("no gradient") - 2


def test_product__few_rows_wait_for_memory():
    model = Model(H100, Head(16, 4096, 126464))
    head_ms = 2 * 4096 * (126464 + 16) / 3e12 * 1e3
    assert head_ms < model.unit_ms() < 1.01 * head_ms + LAUNCH_US / 1e3
    slower = Model(replace(H100, bandwidth=1.5), Head(16, 4096, 126464))
    assert slower.unit_ms() == pytest.approx(2 * model.unit_ms(), rel=0.01)


def test_percent__is_units_times_unit_over_time():
    model = Model(H100, LLADA)
    for mode, units in MODES.items():
        assert model.percent(mode) == pytest.approx(100 * units * model.unit_ms() / model.ms(mode))
        assert 50 < model.percent(mode) < 100
    with pytest.raises(ValueError, match="mode must be one of"):
        model.launches("unknown")


def test_measurements__the_latest_row_of_the_same_case_counts(tmp_path):
    head = "date,git,device,provider,mode,gemm,N,D,V,case,ms_p50,pct_of_gemm"
    case = "NVIDIA H100 80GB HBM3,vrpo,no gradient,fused,64,32,128"
    files = {
        "b": [f"2026-01-02,new,{case},random logits,2.0,80", f"2026-01-03,x,{case},peaked logits,9,1"],
        "a": [f"2026-01-01,old,{case},random logits,1.0,90"],
        "c": [f"2026-01-04,cut,{case},random logits,,", "2026-01-05,v,NVIDIA V100,vrpo,m,fused,1,1,1,x,1,1"],
    }
    for folder, lines in files.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kernels.csv").write_text("\n".join([head, *lines]), encoding="utf-8")
    found = bench_model.measurements(tmp_path)
    assert list(found) == [("H100", 64, 32, 128, "no gradient", "fused")]
    (one,) = found.values()
    assert (one.git, one.ms, one.percent) == ("new", 2.0, 80.0)


def test_main__prints_predictions_beside_measured_times_and_the_goals(capsys):
    assert bench_model.main(["--devices", "H100", "H200", "--rows", "1024", "4096"]) == 0
    text = capsys.readouterr().out
    predicted = Model(H100, LLADA, "fused").ms("trained, tiles kept")
    measured = bench_model.measurements(RESULTS / "gpu")[
        "H100", 4096, 4096, 126464, "trained, tiles kept", "fused"
    ]
    miss = f"{measured.ms:.2f} ({measured.percent:.0f} %) {100 * (measured.ms / predicted - 1):+.0f} %"
    assert f"{predicted:.2f} (" in text and miss in text
    assert "H100, goal 87 % for 1, 2, 3 units from N = 4096 on: " in text
    assert "H200, fused" in text and "measured" not in text.split("H200, fused")[1].split("H200, goal")[0]


def test_below_goal__names_what_the_model_puts_below(monkeypatch):
    rows = [512, 4096]
    for goal, count in ((0.0, 0), (100.0, 3)):
        monkeypatch.setitem(bench_model.GOALS, "H100", goal)
        assert len(bench_model.below_goal("H100", rows, 4096, 126464)) == count


def test_main__refuses_sizes_below_one(capsys):
    with pytest.raises(SystemExit):
        bench_model.main(["--rows", "0"])
    assert "--rows must be at least 1" in capsys.readouterr().err
