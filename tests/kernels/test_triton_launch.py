"""What the launchers hand to Triton, without a GPU: every launch binds and compiles for a stand-in H100.

A stand-in driver names the target, and launches stop after compilation. Values are garbage; what counts is
which binary each launch selects.
"""

import importlib.util
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package `triton` is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("test_gpu.py launches for real", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vrpo_kernels.cross_entropy import kernel as cross_entropy
from vrpo_kernels.linear_cross_entropy import kernel
from vrpo_kernels.linear_cross_entropy.tiles import tiles_for
from vrpo_kernels.mask_select import kernel as mask_select
from vrpo_kernels.pack_masked import kernel as pack_masked
from vrpo_kernels.rotary import kernel as rotary

NLL_KERNELS = {
    "_target_logits_kernel",
    "_fold_kernel",
    "_fold_blocks_kernel",
    "_logits_fold_descriptor_kernel",
    "_logits_fold_pointer_kernel",
    "_finish_rows_kernel",
}


class _Hopper:
    """As much of a Triton driver as binding arguments and compiling need."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


@pytest.fixture
def launches(monkeypatch):
    """The list of (kernel name, hash of the binary) of the launches made so far."""
    made: list[tuple[str, str]] = []
    compile_only = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        compiled = compile_only(self, *args, grid=grid, warmup=True, **options)
        made.append((self.__name__, compiled.hash))
        return compiled

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(driver, "_active", _Hopper())  # reset_active() would look for a real driver
    return made


def _inputs(N, V, D, dtype=torch.bfloat16):
    return torch.zeros(N, D, dtype=dtype), torch.zeros(V, D, dtype=dtype), torch.zeros(N, dtype=torch.long)


@pytest.mark.parametrize(
    ("gemm", "D"),
    [
        pytest.param("cublas", 133, id="cublas-D133"),
        pytest.param("fused", 136, id="fused-descriptors-D136"),
        pytest.param("fused", 133, id="fused-pointers-D133"),
    ],
)
@pytest.mark.parametrize("whole", [False, True], ids=["plain", "whole_head_with_metrics"])
def test_forward__launches_the_same_binaries_for_nll_in_every_mode(gemm, D, whole, launches, monkeypatch):
    two_tiles = replace(tiles_for((9, 0), 2, gemm), cols=8192, max_cols=8192)
    monkeypatch.setattr(kernel, "_tiles", lambda hidden, gemm: two_tiles)
    hidden, weight, targets = _inputs(1024, 8500, D)
    head = {"bias": weight[:, 0], "softcap": 30.0, "scale": 0.5, "want_metrics": True} if whole else {}
    selected = []
    for want_dhidden, keep_tiles in ((False, False), (True, False), (False, True), (True, True)):
        launches.clear()
        wanted = {"want_dhidden": want_dhidden, "keep_tiles": keep_tiles}
        kernel.forward(hidden, weight, targets, gemm=gemm, **wanted, **head)
        selected.append([launch for launch in launches if launch[0] in NLL_KERNELS])
    assert len(selected[0]) == (4 if gemm == "cublas" else 6)  # logits of the targets, two tiles, rows
    assert all(other == selected[0] for other in selected[1:])


def test_fused__few_rows_take_a_binary_of_their_own(launches):
    binaries = {}
    for num_rows in (256, 512, 640, 1024):
        launches.clear()
        wanted = {"want_dhidden": False, "keep_tiles": False}
        kernel.forward(*_inputs(num_rows, 8500, 136), gemm="fused", **wanted)
        binaries[num_rows] = {binary for name, binary in launches if name == "_logits_fold_descriptor_kernel"}
    assert binaries[256] == binaries[512] != binaries[640] == binaries[1024]


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_gradients__every_launch_binds_and_compiles(gemm, softcap, launches):
    hidden, weight, targets = _inputs(1024, 8500, 64)
    dnll = torch.zeros(1).expand(1024)  # what sum().backward() passes: stride 0
    head = {"softcap": softcap, "scale": 1.0}
    wanted = {"want_dhidden": True, "keep_tiles": True}
    _, statistics, expected, kept, shift, _ = kernel.forward(
        hidden, weight, targets, gemm=gemm, **wanted, **head
    )
    launches.clear()
    kernel.dhidden(dnll, expected, statistics, weight, targets, **head)
    under = kernel.rebase_kept(kept, targets, statistics, statistics, 8500, softcap)
    known = (dnll, hidden, weight, targets)
    wanted = {"want_dweight": True, "want_dbias": True}
    kernel.dweight(*known, under, kept, shift, gemm=gemm, **head, **wanted)
    kernel.sweep(*known, statistics, gemm=gemm, bias=weight[:, 0], want_dhidden=True, **head, **wanted)
    names = [name for name, _ in launches]
    assert names.count("_scale_rows_kernel") == 3
    assert names.count("_dhidden_kernel") == 1
    assert names.count("_rebase_kept_kernel") == 1
    assert names.count("_tile_factors_kernel") == 2
    tiles = names.count("_probabilities_kernel" if gemm == "cublas" else "_logits_fold_descriptor_kernel")
    assert names.count("_column_sums_kernel") == 1 + tiles >= 2


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_forward__one_binary_for_all_softcaps_and_scales(gemm, launches):
    hidden, weight, targets = _inputs(1024, 8500, 64)
    selected = []
    for softcap, scale in ((30.0, 0.5), (1.0, 2.0), (1e4, 1e-3)):
        launches.clear()
        wanted = {"want_dhidden": False, "keep_tiles": False}
        kernel.forward(hidden, weight, targets, gemm=gemm, softcap=softcap, scale=scale, **wanted)
        selected.append(list(launches))
    assert selected[0] and all(other == selected[0] for other in selected[1:])


def test_cross_entropy__every_launch_binds_and_compiles(launches):
    logits = torch.zeros(5, 1001, dtype=torch.bfloat16)
    rows, owner = torch.tensor([3, 1]), torch.tensor([-1, 1, -1, 0, -1])
    for row_N, owner_M, targets in ((rows, owner, rows), (None, None, torch.zeros(5, dtype=torch.long))):
        nll, statistics = cross_entropy.forward(logits, targets, row_N)
        cross_entropy.backward(torch.ones_like(nll), logits, targets, owner_M, statistics, logits)
    assert [name for name, _ in launches] == ["_forward_kernel", "_backward_kernel"] * 2


def test_mask_select__a_launch_binds_and_compiles_with_the_largest_seed(launches):
    length_S, counter_S3 = torch.tensor([100, 200]), torch.zeros(2, 3, dtype=torch.long)
    draw = (length_S, counter_S3, torch.zeros_like(length_S), length_S // 2, 2**64 - 1)
    mask_select.mask_select(*draw, True, 150)
    assert [name for name, _ in launches] == ["_select_by_rank_kernel"]


def test_pack_masked__one_launch_each_binds_and_compiles(launches):
    lengths, position_N = torch.tensor([4, 7]), torch.tensor([1, 3])
    offsets_S1 = torch.tensor([0, 1, 1, 1, 2])
    pack_masked.pack_masked(torch.zeros(22).long(), lengths, lengths, position_N, offsets_S1, 2, 126336)
    pack_masked.token_weight_sums(torch.ones(2), position_N, offsets_S1, lengths, 2, 11)
    assert [name for name, _ in launches] == ["_pack_kernel", "_token_weight_sums_kernel"]


def test_pack_masked__one_binary_for_all_sizes(launches):
    for num_samples, mask_token_id in ((1, 0), (3, 126336), (16, 16)):
        offsets_S1 = torch.zeros(num_samples + 1, dtype=torch.long)
        length_R, position_N = torch.tensor([16]), torch.zeros(0, dtype=torch.long)
        batch = (torch.zeros(32).long(), length_R, length_R, position_N, offsets_S1)
        pack_masked.pack_masked(*batch, num_samples, mask_token_id)
        pack_masked.token_weight_sums(torch.ones(0), position_N, offsets_S1, length_R, num_samples, 16)
    assert len(set(launches)) == 2


def test_rotary__one_launch_binds_and_compiles_for_packs_and_batches(launches):
    for batch, heads, length, inverse in ((1, 32, 100, False), (4, 6, 7, True)):
        projection = torch.zeros(batch, length, heads * 128, dtype=torch.bfloat16)
        query = projection.view(batch, length, heads, 128).transpose(1, 2)
        angle = torch.zeros(1, length, 128)[..., :64].expand(batch, -1, -1)
        rotary.rotary(query, query[:, :2], angle, angle, inverse)
    assert [name for name, _ in launches] == ["_rotary_kernel"] * 2


def test_rotary__one_binary_for_all_lengths(launches):
    for length in (1, 16, 1000):
        query = torch.zeros(1, length, 32, 128, dtype=torch.bfloat16).transpose(1, 2)
        angle = torch.zeros(1, length, 128)[..., :64]
        rotary.rotary(query, query, angle, angle, False)
    assert len(set(launches)) == 1
