"""examples/integrations: value and gradient of each drop-in against its codebase's formula on all logits."""

import pytest
import torch

from examples.integrations import axolotl, measure
from examples.integrations.cases import Batch, cases
from examples.integrations.toy import Toy

V, D, B, L = 43, 16, 4, 16


def named(dtype):
    return {case.name: case for case in cases(Batch(B, L, V, dtype))}


NAMES = list(named(torch.float32))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize("name", NAMES)
def test_integration__equals_the_formula_in_value_and_gradient(name, dtype, tolerance):
    """fp64 runs the reference backend, fp32 the default one. The gradients: embedding, body and head."""
    torch.manual_seed(7)
    model = Toy(V, D, dtype)
    case = named(dtype)[name]
    want = case.all_logits(model)
    upstream = torch.randn(want.shape, dtype=dtype)  # signed and uneven, as advantages are
    want_gradients = torch.autograd.grad(want, list(model.parameters()), upstream)
    got = case.ours(model)
    assert got.shape == want.shape and got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.detach().abs().max()))
    assert float(want.detach().abs().max()) > 0.1
    gradients = torch.autograd.grad(got, list(model.parameters()), upstream)
    for candidate, expected in zip(gradients, want_gradients, strict=True):
        assert float(expected.abs().max()) > 0
        floor = tolerance * float(expected.abs().max())
        torch.testing.assert_close(candidate, expected, rtol=tolerance, atol=floor)


def test_axolotl__accuracy_is_the_share_of_first_choices():
    torch.manual_seed(7)
    model, batch = Toy(V, D, torch.float64), Batch(B, L, V, torch.float64)
    noised = batch.noised(batch.masked)
    choice = torch.nn.functional.pad(model(noised).logits.argmax(-1), (1, -1))  # of the position before
    batch.tokens[::2] = choice[::2]  # every second sequence is predicted right; noised stays as it is
    arguments = (batch.tokens, batch.masked, batch.p_mask)
    _, accuracy = axolotl.diffusion_loss(model, model.lm_head.weight, {"input_ids": noised}, *arguments)
    want = (choice == batch.tokens)[batch.masked].double().mean()
    assert 0.2 < float(want) < 0.8
    torch.testing.assert_close(accuracy.double(), want, rtol=1e-6, atol=0)


def test_integrations__each_says_where_it_belongs_in_60_lines():
    rows = {row["name"]: row for row in measure.read()}
    files = {path.stem: path for path in measure.FOLDER.glob("*.py")}
    for support in ("__init__", "toy", "formulas", "cases", "measure"):
        del files[support]
    assert set(files) == set(rows) == {name.split(",")[0] for name in NAMES}
    for name, path in files.items():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 60
        for heading in ("Replaces: ", "Faster: ", "Memory: "):
            assert f"\n{heading}" in text
        assert measure.figure(rows[name]) in text  # the committed measurement


def test_integrations__readme_has_the_measured_table():
    readme = (measure.FOLDER / "README.md").read_text(encoding="utf-8")
    assert readme.rstrip().endswith(measure.table(measure.read()))


def test_measure__runs_every_drop_in(capsys):
    threads = torch.get_num_threads()
    try:
        assert measure.main(["--tiny"]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert printed.count("\n| [") == len(measure.read()) == 9
