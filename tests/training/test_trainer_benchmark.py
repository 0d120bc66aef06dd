"""`python -m benchmarks trainer` at a tiny size: every variant, gated, one row each."""

import csv

import pytest
import torch

from benchmarks import bench_trainer

TINY = ["--hidden", "16", "--layers", "2", "--vocabulary", "300", "--prompt", "4", "--response", "5"]
TINY += ["--pairs", "1", "--num-samples", "2", "--rounds", "1"]


def test_main__writes_a_row_for_every_variant(tmp_path, capsys):
    threads = torch.get_num_threads()
    # The compiler, half a minute for each variant, has its own test.
    names = [name for name in bench_trainer.variants(2) if "compiled" not in name]
    assert len(names) == len(bench_trainer.variants(2)) - 2
    try:
        assert (
            bench_trainer.main([*TINY, "--variants", *names, "--output", str(tmp_path / "trainer.csv")]) == 0
        )
    finally:
        torch.set_num_threads(threads)
    with (tmp_path / "trainer.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == names
    assert {row["precision"] for row in rows} == {"float32"}
    assert all(float(row["ms"]) > 0 and float(row["gradient_error"]) < 1e-4 for row in rows)
    assert "top, shared trunk" in capsys.readouterr().out


def test_check__under_autocast_every_variant_starts_from_score_zero():
    """The policy must run as the reference does; else precomputed references and trunks round otherwise."""
    names = [name for name in bench_trainer.variants(2) if "compiled" not in name]
    rows = bench_trainer.measure(bench_trainer.parse([*TINY, "--bf16", "--variants", *names]))
    assert {row["precision"] for row in rows} == {"bfloat16"}
    errors = {row["variant"]: float(row["gradient_error"]) for row in rows}
    assert all(error == 0 for name, error in errors.items() if "replay" not in name), errors


@pytest.mark.parametrize("precision", ["--no-bf16", "--bf16"])
def test_measure__stops_where_a_gradient_is_another(monkeypatch, precision):
    args = bench_trainer.parse([*TINY, precision, "--variants", "plain", "plain, replay"])
    wrong = bench_trainer.variants(2) | {"plain, replay": bench_trainer.Variant("plain", {"beta": 0.3})}
    monkeypatch.setattr(bench_trainer, "variants", lambda layers: wrong)
    with pytest.raises(RuntimeError, match=r"plain, replay: the gradient differs by .* from plain"):
        bench_trainer.measure(args)


@pytest.mark.parametrize("names", [["fast"], ["lora, replay"]])
def test_parse__refuses_unknown_variants_and_those_without_their_baseline(names, capsys):
    with pytest.raises(SystemExit):
        bench_trainer.parse(["--variants", *names])
    assert "--variants" in capsys.readouterr().err
