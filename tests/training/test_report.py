"""Beside a trained model lie its curves; a run is not lost to them."""

from trainers import trainer_of

from vrpo.training import report
from vrpo.training.report import FIGURE_FILE, REPORT_FILE, curves_of, write_report

LOG = [
    {"step": 1, "loss": 0.7, "logps/chosen": -20.0, "elbo/ref_chosen": -20.0, "epoch": 0.1},
    {"step": 1, "eval_loss": 0.69},
    {"step": 2, "loss": 0.5, "logps/chosen": -21.5, "elbo/ref_chosen": -20.0, "epoch": 0.2},
    {"step": 2, "train_runtime": 3.0},
]


def test_curves_of__adds_displacement_and_keeps_steps():
    curves = curves_of(LOG)
    assert curves["loss"] == [(1, 0.7), (2, 0.5)] and curves["eval_loss"] == [(1, 0.69)]
    assert curves["displacement/chosen"] == [(1, 0.0), (2, -1.5)]
    assert "displacement/rejected" not in curves


def test_write_report__writes_a_table_and_a_figure(tmp_path):
    assert write_report(str(tmp_path), LOG, "out")
    text = (tmp_path / REPORT_FILE).read_text()
    assert "| Loss | training | nats | 0.7 | 0.5 | 0.5 | 0.7 | 2 |" in text and f"({FIGURE_FILE})" in text
    assert (tmp_path / FIGURE_FILE).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not write_report(str(tmp_path / "none"), [{"step": 1}], "out") and not (tmp_path / "none").exists()


def test_write_report__has_no_figure_without_matplotlib(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    for folder in ("a", "b"):
        write_report(str(tmp_path / folder), LOG, "out")
    assert "| Loss |" in (tmp_path / "b" / REPORT_FILE).read_text()
    assert not (tmp_path / "b" / FIGURE_FILE).exists()
    assert caplog.text.count("pip install vrpo[plot]") == 1


def test_save_model__writes_the_report_and_links_it(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_steps=2, training_report=True)
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "out" / REPORT_FILE).read_text()
    for row in ("| Margin | training |", "| Displacement (policy - reference) | chosen |", "| Peak memory |"):
        assert row in text
    assert f"[{REPORT_FILE}]({REPORT_FILE})" in (tmp_path / "out" / "README.md").read_text()


def test_save_model__does_not_lose_the_model_to_the_report(
    tmp_path, tiny_model, tokenizer, pair_rows, monkeypatch, caplog
):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_steps=1, training_report=True)
    trainer.train()

    def broken(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "_figure", broken)
    trainer.save_model()
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert f"no {REPORT_FILE}" in caplog.text and "RuntimeError: no font" in caplog.text
    assert REPORT_FILE not in (tmp_path / "out" / "README.md").read_text()


def test_save_model__writes_no_report_where_it_is_switched_off(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_steps=1, training_report=False)
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "out" / REPORT_FILE).exists()
