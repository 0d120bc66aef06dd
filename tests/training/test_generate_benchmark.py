"""`python -m benchmarks generate` at a tiny size: the public loop, the gate, the rows, what is refused."""

import csv
from dataclasses import replace

import pytest
import torch
from plain_llada import PlainLLaDA
from plain_sampler import PlainSettings, plain_decode

from benchmarks import bench_generate
from vrpo.generation import SamplerConfig

TINY = bench_generate.Case(
    bench_generate._size(2, 16, 2, 24, 60), prompts=(3, 9, 5, 1), config=SamplerConfig(12, 6, 4)
)
WAYS = list(bench_generate.WAYS)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench_generate, "CASES", {"tiny": TINY})
    return TINY


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def decode(way, case, model=None):
    model = model or bench_generate.make_model(case.size, "cpu")
    prompts = bench_generate.make_prompts(case)
    return bench_generate.WAYS[way](model, prompts, case.config, case.size.mask_token_id)


@pytest.mark.parametrize("steps", [2, 4, 10, 12])
@pytest.mark.parametrize("way", WAYS)
def test_ways__decode_what_the_paper_says(way, steps):
    """Neither the product's sampler nor its model on the other side."""
    case = replace(TINY, config=SamplerConfig(12, 6, steps))
    settings = PlainSettings(gen_length=12, block_length=6, steps=steps)
    model = bench_generate.make_model(case.size, "cpu")
    with torch.no_grad():
        model.lm_head.weight[case.size.mask_token_id] *= 5  # a model that likes to predict the mask token
        want = [
            plain_decode(PlainLLaDA.like(model), prompt.tolist(), settings, mask_id=case.size.mask_token_id)
            for prompt in bench_generate.make_prompts(case)
        ]
    assert decode(way, case, model).tolist() == want


def test_models__predict_many_tokens():
    """Else every order of revealing would give the same, and the gate would see nothing."""
    case = bench_generate.QUICK["1 M"]
    assert len(decode(bench_generate.OURS, case).unique()) > 0.3 * 32 * len(case.prompts)
    other = replace(case, config=replace(case.config, remasking="random"))
    assert (decode(bench_generate.OURS, case) != decode(bench_generate.OURS, other)).float().mean() > 0.2


def test_case__counts_rows_and_passes():
    # Two blocks of two steps: 6 masked and then 3, of 4 prompts.
    assert TINY.rows_per_step() == 4 * 4.5
    assert [TINY.passes(way) for way in WAYS] == [4, 4, 16]


def test_case__counts_the_products_that_decoding_needs():
    """The layer below the last against torch's own counter, which on a CPU sees no attention."""
    from torch.utils.flop_counter import FlopCounterMode

    case = replace(TINY, config=SamplerConfig(12, 12, 12))
    lengths, masked = [15, 21, 17, 13], case.rows_per_step()
    body = bench_generate.make_model(replace(case.size, layers=1), "cpu").model
    with FlopCounterMode(display=False) as counter:
        for length in lengths:
            body(input_ids=torch.ones(1, length, dtype=torch.int64), use_cache=False)
    below = counter.get_total_flops() + 4 * 16 * sum(n * n for n in lengths)
    # Of the last layer keys and values of all tokens, the rest of the masked ones.
    last = 2 * 2 * 16 * 16 * sum(lengths) + 2 * (2 * 16 * 16 + 3 * 16 * 24) * masked
    attention = 4 * 16 * masked * sum(lengths) / 4
    head = 2 * masked * 16 * 60
    assert case.gflop_per_step() == pytest.approx(1e-9 * (below + last + attention + head))


def test_main__writes_a_row_for_every_way(tiny, tmp_path, capsys):
    output = tmp_path / "generate.csv"
    flags = ["--rounds", "2", "--output", str(output)]
    assert bench_generate.main(flags) == 0
    assert bench_generate.main(flags) == 0
    with output.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["way"] for row in rows] == 2 * WAYS
    assert tuple(rows[0]) == bench_generate.FIELDS
    fastest = [float(rows[first]["ms"]) for first in (0, 0, 0, 3, 3, 3)]
    for row, ours in zip(rows, fastest, strict=True):
        assert row["case"] == "tiny" and row["prompt_lengths"] == "3 9 5 1" and row["note"] == ""
        assert row["same_tokens"] == "1" and row["rounds"] == "2" and row["clock"] == "cpu time"
        ms, steps = float(row["ms"]), int(row["steps"])
        assert float(row["tokens_per_s"]) == pytest.approx(4 * 12 / ms * 1e3, rel=1e-2)
        assert float(row["ms_per_pass"]) == pytest.approx(ms / int(row["passes"]), rel=1e-2)
        needed = steps * float(row["gflop_per_step"]) / float(row["gemm_gflops"]) * 1e3
        assert float(row["pct_of_gemm"]) == pytest.approx(100 * needed / ms, rel=1e-2)
        assert float(row["speedup"]) == pytest.approx(ms / ours, rel=1e-2)
        assert int(row["parameters"]) == 2 * (4 * 16 * 16 + 3 * 16 * 24) + 2 * 60 * 16 + 5 * 16
    padded = {row["way"]: float(row["peak_MiB"]) for row in rows}
    assert padded[WAYS[0]] < padded[WAYS[1]]
    assert "% of the matmul rate" in capsys.readouterr().out


@pytest.mark.parametrize("way", WAYS)
def test_main__times_nothing_where_a_token_is_another(tiny, way, tmp_path, monkeypatch):
    plain = bench_generate.WAYS[way]

    def wrong(*args):
        tokens_BG = plain(*args)
        tokens_BG[2, 7] = (tokens_BG[2, 7] + 1) % 59
        return tokens_BG

    monkeypatch.setitem(bench_generate.WAYS, way, wrong)
    output = tmp_path / "generate.csv"
    with pytest.raises(RuntimeError, match=r"1 of 48 tokens are not those of vrpo; nothing is timed"):
        bench_generate.main(["--rounds", "1", "--output", str(output)])
    assert not output.exists()


def test_main__another_file_is_refused_before_any_work(tiny, tmp_path, monkeypatch):
    output = tmp_path / "other.csv"
    output.write_text("a,b\n1,2\n")
    monkeypatch.setattr(bench_generate, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match="has the columns"):
        bench_generate.main(["--output", str(output)])
    assert output.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cases", "2 M"], "--cases must be of 1 M, "),
        (["--rounds", "0"], "must be a whole number from 1, got '0'"),
        (["--threads", "two"], "must be a whole number from 1, got 'two'"),
    ],
)
def test_parse__refuses_what_it_does_not_know(flags, message, capsys):
    with pytest.raises(SystemExit):
        bench_generate.parse(flags)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_parse__refuses_a_gpu_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        bench_generate.parse(["--device", "cuda"])
    assert "torch finds no CUDA device" in capsys.readouterr().err
