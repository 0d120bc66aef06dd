"""`python -m benchmarks gpu-step` on the CPU: every line of it runs, and what fails does not end it."""

import csv
import math
import time

import pytest
import torch

from benchmarks import bench_step
from benchmarks.gpu_reached import not_reached
from benchmarks.step_run import FIELDS, Run, label
from benchmarks.step_setup import TINY, Scorer, Size, build_model, make_batch, step_flops
from benchmarks.step_timing import kernel_class
from vrpo.step import Estimator

# A product of two bf16 tensors, as torch's kernels spell it.
PRODUCT = (
    "at::native::BinaryFunctor<c10::BFloat16, c10::BFloat16, c10::BFloat16, "
    "at::native::binary_internal::MulFunctor<float> >"
)


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_bench_step__every_item_is_a_row_with_figures(tmp_path, capsys):
    output = tmp_path / "step.csv"
    assert bench_step.main(["--tiny", "--output", str(output), "--seconds", "120", "--revision", "abc"]) == 0
    rows = read(output)
    assert tuple(rows[0]) == FIELDS
    assert {row["git"] for row in rows} == {"abc"}
    lines = capsys.readouterr().out.splitlines()
    (planned,) = (line.removeprefix("plan: ").split(" | ") for line in lines if line.startswith("plan: "))
    assert planned == [label(row["case"], row["K"]) for row in rows] == bench_step.planned()
    assert not_reached(lines) == []
    wrong = [row for row in rows if any(word in row["note"] for word in ("Error", "skipped", "WRONG", "NOT"))]
    assert not wrong
    timed = [row for row in rows if row["ms_backward"]]
    assert [int(row["K"]) for row in timed if row["case"] == "LoRA"] == list(bench_step.SWEEP)
    assert [int(row["K"]) for row in timed if row["case"] == "full"] == list(bench_step.FULL_SWEEP)
    cases = {row["case"].removeprefix("LoRA, ") for row in timed}
    assert cases >= {"full logits", "masked logits", "packed", "padded", "no checkpointing", "deterministic"}
    assert "inputs widened" in cases
    for row in timed:
        assert float(row["score"]) == 0 and float(row["loss"]) == torch.tensor(math.log(2)).item()
        assert float(row["ms"]) >= float(row["ms_reference"]) > 0 and float(row["pct_of_gemm"]) > 0
    assert "elementwise" in (tmp_path / "profile_step.txt").read_text()


def test_main__names_a_folder_given_as_output(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_step.main(["--tiny", "--output", str(tmp_path)])
    assert f"{tmp_path} is a folder" in capsys.readouterr().err


def test_bench_step__ends_at_a_point_in_time_and_says_what_is_missing(tmp_path, capsys):
    output = tmp_path / "step.csv"
    late = str(time.time() - 1)
    assert bench_step.main(["--tiny", "--output", str(output), "--until", late]) == 0
    notes = {row["case"]: row["note"] for row in read(output)}
    assert not any(row["ms"] for row in read(output)) and notes["full, model"].startswith("skipped: ")
    (line,) = not_reached(capsys.readouterr().out.splitlines())
    number = len(bench_step.planned())
    assert line.startswith(f"not reached, {number} of {number}: gemm roof; ")


def test_bench_step__runs_in_bf16_under_autocast(tmp_path):
    run = Run("cpu", TINY, torch.bfloat16, tmp_path / "step.csv", seconds=60, git="")
    training = bench_step.Training(run)
    assert {parameter.dtype for parameter in training.parameters()} == {torch.float32}
    bench_step.first_step(run, training)
    bench_step.bench(run, training, "LoRA", 2)
    seen = []
    name, module = next(item for item in training.model.named_modules() if "lora_A.default" in item[0])
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    bench_step.bench(run, training, "LoRA", 1)
    with bench_step.widened_inputs(training.model):
        seen.append("widened")
        bench_step.bench(run, training, "LoRA, inputs widened", 1)
    seen.append("as before")
    bench_step.bench(run, training, "LoRA", 1)
    kinds = [list(dict.fromkeys(group)) for group in _split(seen, ("widened", "as before"))]
    assert kinds == [[torch.bfloat16], [torch.float32], [torch.bfloat16]], name
    rows = read(run.output)
    assert rows[0]["note"].startswith("score exactly 0.0")
    assert [row["score"] for row in rows] == ["0.0"] * 5


def _split(items, marks):
    groups = [[]]
    for item in items:
        if item in marks:
            groups.append([])
        else:
            groups[-1].append(item)
    return groups


def test_bench_step__deterministic_puts_back_what_it_set():
    before = torch.utils.deterministic.fill_uninitialized_memory
    with bench_step.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == before


def test_bench_step__time_is_kept_back_for_the_profile(tmp_path, monkeypatch):
    run = Run("cpu", TINY, torch.float32, tmp_path / "step.csv", seconds=bench_step.PROFILE_SECONDS, git="")
    bench_step.vary_lora(run)
    notes = {row["case"]: row["note"] for row in read(run.output)}
    assert notes.pop("LoRA, profile") == "written to profile_step.txt"
    assert notes.pop("LoRA, sdpa").startswith("left out")
    assert len(notes) == 9 and all(note.startswith("skipped") for note in notes.values())


def test_bench_step__what_fails_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    run = Run("cpu", TINY, torch.float32, tmp_path / "step.csv", seconds=60, git="")
    training = bench_step.Training(run)
    measure = bench_step.timed_steps

    def failing(*args, **options):
        monkeypatch.setattr(bench_step, "timed_steps", measure)
        raise torch.OutOfMemoryError("tried to allocate 9 GiB\nmore")

    monkeypatch.setattr(bench_step, "timed_steps", failing)
    assert not bench_step.bench(run, training, "LoRA", 2)
    assert bench_step.bench(run, training, "LoRA", 1)
    run.deadline = 0.0
    assert not bench_step.bench(run, training, "LoRA", 4)
    notes = [row["note"] for row in read(run.output)]
    assert notes[0] == "out of memory: tried to allocate 9 GiB"
    assert notes[1] == "3 timed"
    assert notes[2].startswith("skipped")


def test_bench_step__without_peft_lora_is_left_out(tmp_path, monkeypatch):
    run = Run("cpu", TINY, torch.float32, tmp_path / "step.csv", seconds=60, git="")
    monkeypatch.setattr(bench_step.importlib.util, "find_spec", lambda name: None)
    bench_step.train_lora(run)
    bench_step.vary_lora(run)
    assert [row["note"] for row in read(run.output)] == ["left out: package peft is not installed"] * 2


FORMS = [{"head": head, "padded": padded} for head in bench_step.HEADS for padded in (False, True)]


@pytest.mark.parametrize("form", [{"alone": True}, *FORMS], ids=str)
def test_scorer__every_form_gives_the_same_nll(form):
    model = build_model(TINY, "cpu", torch.float32)
    batch = make_batch(TINY, mixed=True)
    pack = Estimator(TINY.mask_token_id, 3, "paper", 1, seed=0).pack(batch, 0, "cpu")
    with torch.no_grad():
        expected = Scorer(model)(pack)
        found = Scorer(model, **form)(pack)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_step_flops__counts_the_matmuls_that_run():
    """Against torch's own counter, which sees the matmuls, and on a CPU no attention."""
    from torch.utils.flop_counter import FlopCounterMode

    size = Size(2, 32, 4, 48, 300, 299, 8, 8, (2, 14, 10, 6), gemm=8)
    model = build_model(size, "cpu", torch.float32).requires_grad_(True)
    pack = Estimator(size.mask_token_id, 2, "paper", 1, seed=0).pack(make_batch(size), 0, "cpu")
    model.set_attn_implementation("vrpo_sdpa")
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            Scorer(model, head="masked logits")(pack)
        Scorer(model, head="masked logits")(pack).sum().backward()
    length_S = pack.cu_seqlens_S1.diff().long()
    counted = step_flops(size, length_S, len(pack.row_N), full=True, checkpointing=False)
    attention = 4 * size.hidden * size.layers * float((length_S**2).sum())
    # Forward of reference and policy, and twice that backward.
    assert counter.get_total_flops() == counted - 4 * attention


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matmul"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128>>", "attention"),
        ("_fold_kernel", "head (Triton)"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::mul>", "elementwise"),
        ("_rotary_kernel", "rotary"),
        ("void (anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>", "norm"),
        (
            f"void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<{PRODUCT}",
            "norm, product with weights",
        ),
        (f"void at::native::vectorized_elementwise_kernel<8, {PRODUCT}", "SwiGLU"),
        ("void at::native::(anonymous namespace)::silu_backward_kernel(at::TensorIteratorBase&)", "SwiGLU"),
        (
            "void at::native::vectorized_elementwise_kernel<8, at::native::AUnaryFunctor<c10::BFloat16, "
            "c10::BFloat16, c10::BFloat16, at::native::binary_internal::MulFunctor<float> >",
            "LoRA, scaling",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>, ",
            "sums (residual, LoRA, gradients)",
        ),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copy and cast"),
        ("Memcpy HtoD (Pageable -> Device)", "copy and cast"),
        ("void at::native::reduce_kernel<512, 1, MeanOps>", "reduction and indexing"),
    ],
)
def test_kernel_class__knows_the_names_of_libraries(name, kind):
    assert kernel_class(name) == kind
