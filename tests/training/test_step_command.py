"""`python -m benchmarks step` at sizes of no use: its gate, its floors, its rows, its figure."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as commands
from benchmarks.bare_products import BareProducts
from benchmarks.step import bench, figure, floors, page, profile, rivals
from benchmarks.step.lengths import GSM8K, MIXES, count, make_batch, ultrafeedback_like
from benchmarks.step.setup import SIZES, Models, gradient_error
from benchmarks.step.variants import Stepper, Variant, batched, ladder
from vrpo.models import LLaDAForMaskedDiffusion

PAIRS = [(5, 9, 4), (3, 2, 11)]
ALL = ladder(3, 2, max_tokens=40) | batched(3, max_tokens=40)


def models_of(weights, trains="all"):
    models = Models(SIZES["tiny"], "cpu", weights, top_layers=1 if trains == "top" else 0)
    models.model.double()
    if models.frozen is not None:
        models.frozen.double()
    return models


def stepper_of(variant, models):
    stepper = Stepper(variant, models, make_batch(PAIRS, models.size.mask_token_id))
    stepper.prepare()
    return stepper


@pytest.mark.parametrize("weights", ["full", "LoRA"])
def test_variants__have_the_gradient_of_public_code_in_double_precision(weights):
    known, models = {}, {trains: models_of(weights, trains) for trains in ("all", "top")}
    for name, variant in ALL.items():
        if name == "one batched pass" and weights == "full":
            continue
        own = models[variant.trains]
        stepper_of(variant, own)()
        gradient = known[name] = own.gradients()
        assert all(part.abs().max() > 0 for key, part in gradient.items() if "lora_A" not in key)
        assert gradient_error(gradient, known[variant.baseline]) < 1e-6, name  # the losses are in float32


def test_public_code__is_the_objective_written_sample_by_sample():
    models = models_of("full")
    stepper = stepper_of(ALL["public code"], models)
    stepper()
    got = models.gradients()
    pack, num_samples, elbos = stepper.drawn, 3, {"policy": [], "reference": []}
    for name, model in (("policy", models.model), ("reference", models.frozen)):
        for s in range(pack.num_segments):
            own = slice(int(pack.offsets_S1[s]), int(pack.offsets_S1[s + 1]))
            first, last = pack.cu_seqlens_S1[s].item(), pack.cu_seqlens_S1[s + 1].item()
            logps = model(input_ids=pack.tokens_T[None, first:last]).logits[0].log_softmax(-1)
            chosen = logps[pack.row_N[own] - first, pack.target_N[own]]
            elbos[name].append((pack.weight_N[own] * chosen).sum())
    ratio_R = (torch.stack(elbos["policy"]) - torch.stack(elbos["reference"]).detach()).view(-1, num_samples)
    score_B = rivals.BETA * (ratio_R.mean(1)[0::2] - ratio_R.mean(1)[1::2])
    models.model.zero_grad()
    (-torch.nn.functional.logsigmoid(score_B)).sum().backward()
    assert gradient_error(got, models.gradients()) < 2e-6  # its logits are in float32


def test_padded__rows_point_at_masks_and_padding_is_hidden():
    models = models_of("full")
    stepper = stepper_of(ALL["hand assembly"], models)
    ((batch,),) = stepper.laid_out
    ids = batch.inputs["input_ids"]
    assert ids.shape == (12, 14) and (ids.flatten()[batch.rows] == models.size.mask_token_id).all()
    assert batch.inputs["attention_mask"].sum() == len(stepper.drawn.tokens_T)
    before = rivals.elbos(models.model, batch, head="masked logits")
    ids[batch.inputs["attention_mask"] == 0] = 7
    assert torch.equal(rivals.elbos(models.model, batch, head="masked logits"), before)


def test_padded__equally_long_segments_need_no_mask():
    models = models_of("full")
    by_response = stepper_of(ALL["hand assembly, response by response"], models).laid_out
    assert [len(batches) for batches in by_response] == [2, 2]
    assert all("attention_mask" not in batch.inputs for batches in by_response for batch in batches)
    stepper = Stepper(ALL["public code"], models, make_batch([(4, 3, 3)], models.size.mask_token_id))
    assert all("attention_mask" not in batch.inputs for batch in stepper.laid_out[0])


def test_gate__a_wrong_gradient_ends_the_case_before_anything_is_timed(tmp_path, monkeypatch):
    right = LLaDAForMaskedDiffusion.forward

    def wrong(self, *args, rows=None, **kwargs):
        output = right(self, *args, rows=rows, **kwargs)
        if output.nll is not None:
            output.nll = output.nll * 1.01
        return output

    monkeypatch.setattr(LLaDAForMaskedDiffusion, "forward", wrong)
    output = tmp_path / "step.csv"
    with pytest.raises(RuntimeError, match="nothing of this case was timed"):
        bench.main(["--sizes", "tiny", "--mixes", "gsm8k", "--rounds", "1", "--output", str(output)])
    assert not output.exists()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    output = tmp_path_factory.mktemp("step") / "step.csv"
    threads = torch.get_num_threads()
    arguments = ["--sizes", "tiny", "--pairs", "2", "--rounds", "2", "--samples", "4", "--fewer", "2"]
    assert bench.main([*arguments, "--output", str(output)]) == 0
    torch.set_num_threads(threads)
    with output.open(newline="") as stream:
        return output, list(csv.DictReader(stream))


def test_step__every_variant_is_a_row_with_figures(measured):
    _, rows = measured
    assert [row["variant"] for row in rows] == 2 * list(ladder(4, 2, 40))
    for row in rows:
        least, median, most = (float(row[name]) for name in ("ms", "ms_median", "ms_max"))
        assert 0 < least <= median <= most and row["rounds"] == "2" and not row["note"]
        assert float(row["floor_ms"]) > 0 and float(row["gflop"]) > 0 and float(row["bytes_ms"]) > 0
        assert float(row["pct_of_floor"]) == pytest.approx(100 * float(row["floor_ms"]) / least, rel=1e-3)
        assert row["git"] and row["device"] and float(row["gradient_error"]) <= 1e-4
    known = {row["variant"]: row for row in rows if row["mix"] == "gsm8k"}
    public, hand, ours = (
        known[name] for name in ("public code", "hand assembly", "+ last layer at masked rows")
    )
    assert float(ours["speedup"]) == pytest.approx(float(public["ms"]) / float(ours["ms"]), rel=1e-3)
    assert float(ours["speedup_hand"]) == pytest.approx(float(hand["ms"]) / float(ours["ms"]), rel=1e-3)
    assert (public["K"], known["+ better masks"]["K"]) == ("4", "2")
    assert known["+ better masks"]["design"] == "graded-balanced"


def test_profile__shares_of_each_kind_add_up(measured):
    output, _ = measured
    with output.with_name("step_profile.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["kind"] for row in rows] == 2 * list(profile.KINDS)
    for own in (rows[: len(profile.KINDS)], rows[len(profile.KINDS) :]):
        share = {row["kind"]: float(row["share"]) for row in own}
        assert sum(share.values()) == pytest.approx(1, abs=1e-3)
        assert all(share[kind] > 0 for kind in ("matmul", "attention", "head", "elementwise"))
        assert share["everything else"] < 0.7


def test_figure__has_a_bar_for_each_technique_and_reads_the_newest_rows(measured, tmp_path):
    output, rows = measured
    drawn = figure.draw(output, size="tiny")
    assert len(drawn.axes) == 4
    bars = [bar.get_width() for bar in drawn.axes[0].patches]
    known = {row["variant"]: row for row in rows if row["mix"] == "gsm8k"}
    assert bars == pytest.approx([float(known[name]["ms"]) / 1000 for name in figure.BARS])
    assert (
        bench.main(["--output", str(output), "--figure", str(tmp_path / "deep/a.png"), "--size", "tiny"]) == 0
    )
    assert (tmp_path / "deep/a.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no rows of size '9M'"):
        figure.draw(output)


def test_page__tables_are_ratios_of_the_newest_run(measured, tmp_path, monkeypatch):
    _, rows = measured
    older = [dict(row, ms="1e9") for row in rows]
    path = tmp_path / "step.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows([*older, *rows])
    monkeypatch.setattr(page, "OUTPUT", path)
    tables = page.page_tables()
    assert set(tables) == {"equal", "less", "passes", "generate", *(f"tiny-{mix}" for mix in MIXES)}
    known = {row["variant"]: row for row in rows if row["mix"] == "gsm8k"}
    ours, public, hand = (known[name] for name in ("+ small packs", "public code", "hand assembly"))
    line = next(line for line in tables["equal"].splitlines() if "tiny" in line and "GSM8K" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3] == figure.digits(float(public["ms"]) / float(ours["ms"]))
    assert cells[4] == figure.digits(float(hand["ms"]) / float(ours["ms"]))
    assert cells[6:8] == [f"{float(ours[name]):.0f}" for name in ("pct_of_floor", "peak_MiB")]
    assert len(tables["tiny-gsm8k"].splitlines()) == 2 + len(figure.BARS)
    assert tables["passes"].count("\n") == 1  # a header without rows: no LoRA was measured

    lora = [dict(row, weights="LoRA") for row in rows if row["variant"] in ("public code", "+ small packs")]
    both = [dict(row, variant="one batched pass", ms=str(2 * float(row["ms"]))) for row in lora[1::2]]
    with path.open("a", newline="") as stream:
        csv.DictWriter(stream, list(rows[0])).writerows([*lora[:2], both[0]])
    *_, line = page.page_tables()["passes"].splitlines()
    two, one = (figure.digits(factor * float(ours["ms"])) for factor in (1, 2))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == ["GSM8K's lengths", two, one, f"{float(ours['pct_of_floor']):.0f}"]


def test_latest__a_partial_run_does_not_take_the_place_of_a_full_one(measured, tmp_path):
    _, rows = measured
    known = next(row for row in rows if row["mix"] == "gsm8k")
    path = tmp_path / "step.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows([*rows, dict(known, ms="1e9"), dict(known, ms="1e9", pairs="3")])
    cases = {key[3]: case for key, case in figure.latest(path).items() if key[4] == "2"}
    assert cases["gsm8k"]["public code"]["ms"] == known["ms"] and len(cases["gsm8k"]) > 5
    path.write_text(",".join(rows[0]) + "\n")
    with pytest.raises(ValueError, match="has no measured rows"):
        figure.latest(path)


def work_of(variant, weights="full", top_layers=0, size="tiny"):
    models = Models(SIZES[size], "cpu", weights, top_layers=top_layers)
    counts = floors.Counts(tokens=100.0, rows=20.0, length_squares=1000.0, row_lengths=200.0)
    return floors.step_work(variant, models, counts).flops


def test_floors__count_the_products_of_a_step():
    size = SIZES["tiny"]
    width, mlp, classes = size.hidden, size.mlp, size.classes
    first = 2 * 100 * (4 * width**2 + 3 * width * mlp)
    first_attention = 4 * width * 1000
    last = 2 * 100 * 2 * width**2 + 2 * 20 * (2 * width**2 + 3 * width * mlp)
    last_attention = 4 * width * 200
    head = 2 * 20 * width * classes
    one_pass = first + first_attention + last + last_attention + head
    assert work_of(ALL["packed"]) == pytest.approx(4 * one_pass)  # reference, policy, and backward twice
    assert work_of(ALL["+ reference known"]) == pytest.approx(3 * one_pass)
    assert work_of(ALL["replay"]) == pytest.approx(5 * one_pass - head)
    inputs_alone = 3 * one_pass + first_attention + last_attention - 2 * 100 * 3 * width**2
    assert work_of(ALL["packed"], "LoRA") == pytest.approx(inputs_alone)
    top = Variant("ours", trains="top", share_trunk=True)
    upper = 4 * (last + last_attention + head) - 2 * 100 * 3 * width**2
    assert work_of(top, top_layers=1) == pytest.approx(first + first_attention + upper)
    assert work_of(replace(top, share_trunk=False), top_layers=1) - work_of(top, top_layers=1) == (
        pytest.approx(first + first_attention)
    )


def test_floors__bytes_grow_with_passes():
    models = Models(SIZES["tiny"], "cpu", "full")
    counts = floors.Counts(100.0, 20.0, 1000.0, 200.0)
    known, plain, replay = (
        floors.step_bytes(ALL[name], models, counts) for name in ("+ reference known", "packed", "replay")
    )
    size = models.size
    one_pass = size.body_parameters + size.hidden * size.classes + 2 * 100 * size.hidden * size.layers
    assert plain - known == pytest.approx(4 * one_pass) == replay - plain


def test_floor_ms__divides_each_kind_by_its_own_rate():
    products = BareProducts(SIZES["tiny"], 100, 20, "cpu", torch.float32)
    rates = floors.bare_rates(products, layer_ms=2.0, head_ms=5.0)
    layer = 2 * 100 * (4 * 32**2 + 3 * 32 * 48)
    assert rates == pytest.approx({"layers": layer / 2e-3, "head": 2 * 20 * 32 * 300 / 5e-3})
    assert floors.floor_ms(floors.Work(2.0 * layer, 2 * 20 * 32 * 300), rates) == pytest.approx(9)


def test_lengths__are_those_of_the_file_and_in_their_ranges():
    with GSM8K.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 512
    assert MIXES["gsm8k"](2) == [tuple(int(v) for v in row.values()) for row in rows[:2]]
    with pytest.raises(ValueError, match="num_pairs must be at most 512 for gsm8k, got 513"):
        MIXES["gsm8k"](513)
    drawn = ultrafeedback_like(4000)
    assert drawn[:5] == ultrafeedback_like(5) != ultrafeedback_like(5, seed=1)
    prompts, *responses = zip(*drawn, strict=True)
    assert (min(prompts), max(prompts)) == (20, 900)
    assert min(map(min, responses)) >= 10 and max(map(max, responses)) == 1500
    assert abs(sorted(prompts)[2000] - 100) < 8 and abs(sorted(responses[0])[2000] - 250) < 16


def test_lengths__gsm8k_is_what_the_pairs_give(shared_gsm8k):
    with GSM8K.open(newline="") as stream:
        rows = [tuple(int(v) for v in row.values()) for row in csv.DictReader(stream)]
    assert rows == count(shared_gsm8k)[:512]


@pytest.fixture
def shared_gsm8k():
    path = Path(__file__).parents[3] / "shared/data/gsm8k/preferences_train.jsonl"
    if not path.exists():
        pytest.skip("the GSM8K pairs are not there")
    return path


def test_batch__both_sides_share_the_prompt():
    batch = make_batch([(3, 2, 4), (1, 5, 6)], 50)
    assert batch.length_R.tolist() == [5, 7, 6, 7]
    assert batch.tokens_U[:3].tolist() == batch.tokens_U[5:8].tolist()
    assert (batch.tokens_U < 50).all()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rounds", "0"], "argument --rounds: must be a whole number from 1, got '0'"),
        (["--pairs", "x"], "argument --pairs: must be a whole number from 1, got 'x'"),
        (["--variants", "magic"], "'magic' is none of public code"),
        (["--device", "cuda"], "torch finds no CUDA device"),
    ],
)
def test_arguments__bad_ones_are_refused(arguments, told, capsys):
    if torch.cuda.is_available() and "--device" in arguments:
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert told in capsys.readouterr().err


def test_arguments__a_variant_brings_its_baseline_and_cases_are_chosen():
    args = bench.parse(["--variants", "+ better masks", "--sizes", "9M", "--mixes", "gsm8k"])
    assert args.variants == {"+ better masks", "public code, our masks"}
    assert bench.cases(args) == [("9M", "gsm8k", 4)]
    quick = bench.parse(["--quick"])
    assert bench.cases(quick) == list(bench.QUICK_CASES) and quick.rounds == 2
    assert (quick.output, args.output, args.rounds) == (bench.QUICK_OUTPUT, bench.OUTPUT, 5)
    with pytest.raises(ValueError, match="no case has one of these --sizes"):
        bench.cases(bench.parse(["--sizes", "30M", "--mixes", "ultrafeedback-like"]))


def test_command__is_registered():
    assert commands.BENCHMARKS["step"][0] == "benchmarks.step.bench"
