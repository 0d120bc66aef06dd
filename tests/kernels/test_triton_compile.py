"""Every Triton kernel, compiled ahead of time for Ampere and Hopper without a GPU, held to expectations.

What is held: registers per thread, spills (bytes of stack), shared memory, and the instructions that make
the difference: tensor cores (mma on sm_80, wgmma on sm_90), asynchronous copies (cp.async, TMA), 16-byte
accesses. The limits are what Triton 3.6 (ptxas 12.8) and 3.9 (13.4) gave, whichever was worse, plus 10%.
Nothing spills but the fused fold under a bias or soft-cap on Hopper: up to 25 registers per 128 x 256 logits,
1% of its instructions.
"""

import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package `triton` is not installed", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vrpo_kernels.cross_entropy import kernel as cross_entropy
from vrpo_kernels.linear_cross_entropy import (
    kernel_bias,
    kernel_fold,
    kernel_gemm,
    kernel_known,
    kernel_rows,
    kernel_shards,
)
from vrpo_kernels.linear_cross_entropy.tiles import tiles_for
from vrpo_kernels.mask_select import kernel as mask_select
from vrpo_kernels.pack_masked import kernel as pack_masked
from vrpo_kernels.rotary import kernel as rotary

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
VECTORS = ("ld.global.v4", "st.global.v4")

POINTER_TYPES = {
    **dict.fromkeys(("hidden_ptr", "weight_ptr", "tile_ptr", "kept_ptr", "logits_ptr", "bias_ptr"), "*bf16"),
    **dict.fromkeys(("value_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("target_ptr", "row_ptr", "owner_ptr", "length_ptr", "counter_ptr"), "*i64"),
    **dict.fromkeys(("first_ptr", "count_ptr", "offset_ptr", "position_ptr"), "*i64"),
    **dict.fromkeys(("clean_ptr", "prompt_length_ptr", "response_length_ptr"), "*i64"),
    **dict.fromkeys(("token_out_ptr", "position_out_ptr"), "*i64"),
    "cu_seqlens_ptr": "*i32",
}
# Sizes and strides that are multiples of 16 for every head we know (D = 4096, V = 126464).
ALIGNED = {"V", "D", "first_col", "num_cols", "num_rows"}


@dataclass(frozen=True)
class Case:
    """One kernel at the shape its launcher uses for D = 4096, V = 126464 in bf16."""

    kernel: object
    constants: dict
    options: dict
    registers: int
    contains: tuple[str, ...] = ()
    types: dict = field(default_factory=dict)
    arches: tuple[int, ...] = (80, 90)
    stack: int = 0

    @property
    def name(self) -> str:
        width = self.constants.get("BLOCK_V", "")
        switches = {"KNOWN": "known", "HAS_BIAS": "bias", "HAS_CAP": "cap", "METRICS": "metrics"}
        on = "".join(f"-{word}" for switch, word in switches.items() if self.constants.get(switch))
        stages = f"-stages{self.options['num_stages']}" if "num_stages" in self.options else ""
        return self.kernel.__name__.strip("_") + (f"-{width}" if width else "") + on + stages


PLAIN = {"HAS_BIAS": False, "SCALED": False, "HAS_CAP": False}
FULL = dict.fromkeys(PLAIN, True)
ROW_PLAIN, ROW_FULL = ({"HAS_CAP": on, "SCALED": on} for on in (False, True))


def _gemm_constants(arch: int, known: bool = False, head: dict = PLAIN, metrics: bool = False) -> dict:
    tiles = tiles_for((arch // 10, 0), 2, "fused")
    blocks = {
        "BLOCK_N": tiles.block_rows,
        "BLOCK_V": tiles.block_cols,
        "BLOCK_D": tiles.block_hidden,
        "SLICES": tiles.slices if head["HAS_BIAS"] or head["HAS_CAP"] else 1,
    }
    return {**blocks, **head, "METRICS": metrics, "KNOWN": known}


def _gemm_options(arch: int, rows: int = 4096) -> dict:
    tiles = tiles_for((arch // 10, 0), 2, "fused")
    return {"num_warps": tiles.num_warps, "num_stages": tiles.stages(rows)}


FOLD = tiles_for((9, 0), 2).fold_cols
HOPPER_BLOCK = _gemm_constants(90)
# Plain heads, then what is on for others: bias, scale and cap together, and the cap or the metrics alone.
FOLDS = [(PLAIN, False, 70), (FULL, False, 128), (PLAIN, True, 128), (FULL, True, 128)]
POINTER_GEMMS = [
    # known, head, metrics, registers
    (False, PLAIN, False, 170),
    (False, FULL, False, 255),
    (False, PLAIN, True, 255),
    (False, FULL, True, 255),
    (True, PLAIN, False, 170),
    (True, FULL, False, 255),
]
CASES = [
    *(
        Case(
            kernel_fold._fold_kernel,
            {**head, "METRICS": metrics, "BLOCK_V": FOLD, "BLOCK_D": 1024},
            {"num_warps": 8},
            registers,
            VECTORS,
        )
        for head, metrics, registers in FOLDS
    ),
    *(
        Case(
            kernel_fold._fold_blocks_kernel,
            {"METRICS": metrics, "BLOCK_V": 256, "BLOCK_D": 1024, "BLOCKS": 32},
            {"num_warps": 2},
            56,
        )
        for metrics in (False, True)
    ),
    *(
        case
        for head, row in ((PLAIN, ROW_PLAIN), (FULL, ROW_FULL))
        for case in (
            Case(
                kernel_rows._target_logits_kernel,
                {"HAS_BIAS": head["HAS_BIAS"], "SCALED": head["SCALED"], "BLOCK_D": 1024},
                {"num_warps": 4},
                40,
                VECTORS[:1],
            ),
            Case(
                kernel_known._finish_rows_kernel,
                {"HAS_CAP": head["HAS_CAP"], "BLOCK_N": 128},
                {"num_warps": 4},
                40,
            ),
            Case(
                kernel_known._finish_kept_kernel,
                {"HAS_CAP": head["HAS_CAP"], "NORMALISE": True, "BLOCK_V": 4096},
                {"num_warps": 8},
                48,
                VECTORS,
                {"kept_ptr": "*fp16"},
            ),
            Case(
                kernel_known._probabilities_kernel,
                {**head, "BLOCK_V": FOLD},
                {"num_warps": 8},
                100,
                VECTORS,
            ),
            Case(
                kernel_known._set_targets_kernel,
                {"HAS_CAP": head["HAS_CAP"], "BLOCK_N": 128},
                {"num_warps": 4},
                40,
                types={"tile_ptr": "*fp32"},
            ),
            Case(
                kernel_shards._rebase_kept_kernel,
                {"HAS_CAP": head["HAS_CAP"], "NORMALISED": False, "BLOCK_V": 4096},
                {"num_warps": 8},
                48,
                VECTORS,
            ),
            Case(kernel_rows._dhidden_kernel, {**row, "BLOCK_D": 1024}, {"num_warps": 4}, 40, VECTORS),
            Case(
                kernel_rows._scale_rows_kernel,
                {**row, "PER_SUM": True, "BLOCK_D": 1024},
                {"num_warps": 4},
                40,
                VECTORS,
            ),
        )
    ),
    Case(
        kernel_rows._finish_expected_kernel,
        {"BLOCK_D": 1024},
        {"num_warps": 4},
        32,
        VECTORS,
    ),
    Case(
        kernel_bias._tile_factors_kernel,
        {**ROW_FULL, "PER_SUM": True, "TILE": tl.bfloat16, "BLOCK_N": 128},
        {"num_warps": 4},
        40,
        types={"out_ptr": "*fp32"},
    ),
    Case(
        kernel_bias._column_sums_kernel,
        {"ACCUMULATE": True, "BLOCK_N": 32, "BLOCK_V": 128},
        {"num_warps": 4},
        100,
        VECTORS[:1],
        {"out_ptr": "*fp32"},
    ),
    *(
        Case(
            kernel_gemm._logits_fold_pointer_kernel,
            _gemm_constants(80, known, head, metrics),
            _gemm_options(80),
            registers,
            ("mma.sync", "cp.async.cg", "st.global.v4"),
            arches=(80,),
        )
        for known, head, metrics, registers in POINTER_GEMMS
    ),
    *(
        Case(
            kernel_gemm._logits_fold_descriptor_kernel,
            {**_gemm_constants(90, known, head, metrics), "NUM_PROGRAMS": 132},
            _gemm_options(90, rows),
            255,
            ("wgmma.mma_async", "wgmma.wait_group", "cp.async.bulk.tensor", "st.global.v4"),
            {
                "hidden_desc": f"tensordesc<bf16[{HOPPER_BLOCK['BLOCK_N']},{HOPPER_BLOCK['BLOCK_D']}]>",
                "weight_desc": f"tensordesc<bf16[{HOPPER_BLOCK['BLOCK_V']},{HOPPER_BLOCK['BLOCK_D']}]>",
            },
            arches=(90,),
            stack=0 if known or head is PLAIN else 112,
        )
        for known, head, metrics, _ in POINTER_GEMMS
        for rows in (512, 4096)
    ),
    Case(
        cross_entropy._forward_kernel,
        {"HAS_ROWS": True, "BLOCK_V": 4096},
        {"num_warps": 8},
        88,
        VECTORS[:1],
    ),
    Case(
        cross_entropy._backward_kernel,
        {"HAS_OWNER": True, "BLOCK_V": 4096},
        {"num_warps": 8},
        52,
        (*VECTORS, "bar.sync"),
    ),
    Case(
        mask_select._select_by_rank_kernel,
        {"BLOCK": mask_select._BLOCK, "SHORT_BLOCK": mask_select._SHORT_BLOCK},
        {"num_warps": 8},
        188,
    ),
    Case(
        mask_select._select_by_word_kernel,
        {"WRITE": True, "BLOCK": mask_select._BLOCK},
        {"num_warps": 8},
        144,
    ),
    Case(
        pack_masked._pack_kernel,
        {"BLOCK": pack_masked._BLOCK, "BLOCK_R": pack_masked._BLOCK_R},
        {"num_warps": 4},
        88,
    ),
    Case(
        pack_masked._token_weight_sums_kernel,
        {"BLOCK": pack_masked._BLOCK, "BLOCK_R": pack_masked._BLOCK_R},
        {"num_warps": 4},
        62,
        types={"value_ptr": "*fp32"},
    ),
    Case(
        rotary._rotary_kernel,
        {"INVERSE": False, "HALF": 64, **rotary.block_heads(32, 64)},
        {"num_warps": 4},
        64,
        VECTORS,
        dict.fromkeys(("query_ptr", "key_ptr", "query_out_ptr", "key_out_ptr"), "*bf16"),
    ),
]


def _type(case: Case, name: str) -> str:
    if name in case.types:
        return case.types[name]
    if name in POINTER_TYPES:
        return POINTER_TYPES[name]
    if name.endswith("_ptr"):
        return "*fp32"
    return {**dict.fromkeys(("raise_by", "scale", "softcap"), "fp32"), "seed": "i64"}.get(name, "i32")


def _compile(case: Case, arch: int):
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else _type(case, name) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if (name.endswith("_ptr") or name in ALIGNED or name.startswith("stride_"))
        and not case.kernel.params[i].do_not_specialize
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=aligned)
    options = {**case.options, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    ("case", "arch"),
    [pytest.param(case, arch, id=f"{case.name}-sm{arch}") for case in CASES for arch in case.arches],
)
def test_kernel__compiles_within_stated_resources(case: Case, arch: int):
    compiled = _compile(case, arch)
    registers, stack = _registers_and_stack(compiled.asm["cubin"])
    assert stack <= case.stack, f"{stack} bytes of registers spilled"
    assert registers <= case.registers
    assert compiled.metadata.shared <= SHARED_LIMIT[arch]
    missing = [word for word in case.contains if word not in compiled.asm["ptx"]]
    assert not missing, f"not in the PTX: {missing}"


def test_cases__cover_every_kernel_that_is_launched():
    linear = (kernel_fold, kernel_gemm, kernel_known, kernel_bias, kernel_rows, kernel_shards)
    modules = (*linear, cross_entropy, mask_select, pack_masked, rotary)
    kernels = {
        value.__name__
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.runtime.JITFunction)
    }
    assert kernels == {case.kernel.__name__ for case in CASES}


@pytest.mark.parametrize("kernel", [kernel_fold._fold_kernel, kernel_fold._fold_blocks_kernel])
def test_fold__is_one_binary_with_and_without_gradients(kernel):
    # A value such as store_tile = 1 would otherwise be compiled in, and sums could be ordered differently.
    run_time = {param.name for param in kernel.params if param.do_not_specialize}
    assert {"store_tile", "acc_ptr", "acc_cols", "stride_acc", "kept_cols"} <= run_time


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        pytest.param(case, arch, id=f"{case.name}-sm{arch}")
        for case in CASES
        for arch in case.arches
        if case.kernel in (kernel_fold._fold_kernel, kernel_fold._fold_blocks_kernel)
    ],
)
def test_fold__no_warp_stores_a_new_maximum_before_all_have_read_the_old(case: Case, arch: int):
    # A late warp that loads the new maximum sees no rise and skips its part of the corrections.
    lines = _compile(case, arch).asm["ptx"].splitlines()
    scalar = [i for i, line in enumerate(lines) if re.search(r"ld\.global\.b32 |st\.global\.b32 ", line)]
    stores = [i for i in scalar if "st.global" in lines[i]]
    loads = [i for i in scalar if "ld.global" in lines[i] and i < stores[0]]
    assert len(stores) >= (4 if case.constants["METRICS"] else 2)  # maximum and sum, and of the metrics
    barrier = [i for i, line in enumerate(lines) if "bar.sync" in line]
    assert any(loads[-1] < i < stores[0] for i in barrier)


GEMMS = (kernel_gemm._logits_fold_descriptor_kernel, kernel_gemm._logits_fold_pointer_kernel)


def _reductions(case: Case) -> set[str]:
    """Operand types, layouts written out, of all reductions of a kernel."""
    text = _compile(case, case.arches[-1]).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg.*)$", text, re.MULTILINE))
    operands = re.findall(r"\}\) : \((tensor<[^)]*>)\) -> ", text)
    return {re.sub(r"#\w+(?=[,>})])", lambda name: layouts.get(name[0], name[0]), it) for it in operands}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in CASES if case.constants.get("METRICS")]
)
def test_fold__metrics_leave_the_order_of_every_sum_alone(case: Case):
    # nll has the same bits with and without them: where a sum's terms lie decides in which order they add up.
    without = replace(case, constants={**case.constants, "METRICS": False})
    assert _reductions(case) == _reductions(without) != set()


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if c.kernel in GEMMS])
def test_fused_gemm__takes_every_exponential_once(case: Case):
    # Triton recomputes what it would have to convert to another layout: that cost a bias added in the
    # epilogue a second exponential per logit, and the accumulator's way through shared memory.
    arch, *_ = case.arches
    per_thread = case.constants["BLOCK_N"] * case.constants["BLOCK_V"] // (32 * case.options["num_warps"])
    wanted = per_thread * (2 if case.constants["HAS_CAP"] else 1)
    found = _compile(case, arch).asm["ptx"].count("ex2.approx")
    assert wanted <= found < 1.5 * wanted  # the rows' factors come on top


@pytest.mark.parametrize("head", [PLAIN, FULL], ids=["plain", "full"])
def test_fused_gemm__pipelines_its_tensor_core_loop(head):
    case = next(
        case
        for case in CASES
        if case.kernel is kernel_gemm._logits_fold_descriptor_kernel
        and head.items() <= case.constants.items()
    )
    ptx = _compile(case, 90).asm["ptx"]
    assert "wgmma.wait_group.sync.aligned \t1" in ptx or re.search(r"wgmma\.wait_group\S*\s+1;", ptx)
