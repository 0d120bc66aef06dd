"""`python -m benchmarks pages`: what a mark gives, what is refused, which figures need a mark."""

import json
import re

import pytest

from benchmarks.pages import allowed, command, sources
from benchmarks.pages.figures import figure, written_as
from benchmarks.pages.fill import filled
from benchmarks.pages.sources import Source
from benchmarks.pages.unmarked import Allowed, unmarked

CSV = """case,K,ms,note
LoRA,4,1088.4,
LoRA,8,2096.6,
hand,4,3700.0,
hand,8,,out of memory
"""


@pytest.fixture
def step(tmp_path, monkeypatch):
    """A source `step` and a JSON source `quick` in result files of the test's own."""
    (tmp_path / "step.csv").write_text(CSV)
    (tmp_path / "quick.json").write_text(json.dumps({"vrpo": {"elbo/accuracies": 0.25}, "curve": [[0, 2]]}))
    (tmp_path / "each.csv").write_text("design,each\na,1:.2 2:.5 3:.1\nb,1:.3 2:.4 3:.2\nc,1:.3 3:.2\n")
    (tmp_path / "run-1.jsonl").write_text('{"model": 1, "each": [1, 2]}\n{"model": 2, "each": [6]}\n')
    (tmp_path / "log.txt").write_text("SFT 600 steps 73, 72 s\n1335 to 1965 MHz\n")
    monkeypatch.setattr(sources, "RESULTS", tmp_path)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    names = {
        "step": "step.csv",
        "quick": "quick.json",
        "runs": "run-*.jsonl",
        "log": "log.txt",
        "each": "each.csv",
    }
    return {name: Source(name, path) for name, path in names.items()}


SOURCE = "<!-- source: step = step.csv -->\n\n"


def no_table(name):
    raise ValueError(f"no table is called {name!r}")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ('step(case="LoRA", K=8).ms', 2096.6),
        ('step(case="LoRA", K=8.0)["ms"]', 2096.6),
        ('step(case="hand", K=4).ms / step(case="LoRA", K=4).ms', 3700 / 1088.4),
        ('100 * (step(case="LoRA", K=8).ms - 96.6) / 2000 - 1', 99),
        ('-step(case="LoRA", K=8).ms', -2096.6),
        ('max(step(case="LoRA").ms)', 2096.6),
        ("min(step().ms)", 1088.4),  # a row without a figure counts for nothing
        ("count(step(K=8))", 2),
        ("max(abs(step().K - step().K * 3))", 16),
        ('max(abs(1000 - step(case="LoRA").ms))', 1096.6),
        ("max(step().K - step().ms)", 4 - 1088.4),  # of the rows that have both
        ("abs(-3)", 3),
        ('max(each(design="a").each)', 0.5),
        ('sum(each(design=("a",)).each < 0.3)', 2),
        ('sum(each(design=("a", "b")).each > .25)', 3),
        ('sum(each(design="a").each < each(design="b").each)', 2),
        ("sum(abs(step().K - 5) < 2)", 2),
        ('mean(step(case="LoRA", K=(4, 8)).ms)', (1088.4 + 2096.6) / 2),
        ('sum(step(case="LoRA", K=(8, 4)).ms / step(case="LoRA", K=(8, 4)).K)', 1088.4 / 4 + 2096.6 / 8),
        ('max(step(case=("LoRA", "hand"), K=4).ms / step(case="LoRA", K=4).ms)', 3700 / 1088.4),
        ('quick.vrpo["elbo/accuracies"]', 0.25),
        ("quick.curve[0][1]", 2),
        ("sum(runs().each)", 9),
        ('log(r"(\\d+) MHz") / 1000', 1.965),
        ('min(log(r"(\\d+)(?=[, \\d]* s)"))', 72),
        ("max(runs(model=1).each)", 2),
    ],
)
def test_figure__is_what_the_expression_says(step, expression, value):
    assert figure(expression, step) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ('step(case="LoRA").ms', "selects 2 rows"),
        ('step(case="LoRA", K=8)', "no column of it"),
        ('step(case="QLoRA").ms', "selects no row"),
        ('step(case="LoRA", T=8).ms', "no column T"),
        ('step(case="LoRA", K=8).seconds', "no column 'seconds'"),
        ('step(case="hand", K=8).ms', "must be a number, got ''"),
        ('step(case="hand", K=4).case', "must be a number, got 'hand'"),
        ('max(step(case="hand", K=(4, 8)).ms)', "must be a number, got ''"),
        ('max(step(case="LoRA", K=(4, 16)).ms)', "selects 0 rows .* it needs one"),
        ("max(step(K=(4, 8)).ms)", "selects 2 rows .* it needs one"),
        ('max(step(case="LoRA").ms / step(case="hand").ms)', "selected by the same tuples"),
        (
            'max(step(case="LoRA", K=(4, 8)).ms / step(case="LoRA", K=(8, 4)).ms)',
            "selected by the same tuples",
        ),
        ("gpu(K=8).ms", "no source 'gpu'"),
        ("quick(K=8).ms", "is no table"),
        ("quick.vrpo", "must be a finite number"),
        ("quick.sft", "there is no 'sft'"),
        ("step.ms", "is a table"),
        ("quick.curve[0][1] / quick.curve[0][0]", "divides by 0"),
        ("1e999", "must be a finite number"),
        ("step(K=8", "is no expression"),
        ('step(case="LoRA", K=[8]).ms', "a value or a tuple"),
        ("step(K=runs).ms", "a value or a tuple"),
        ("__import__('os').getpid()", "not one of the forms"),
        ("max(step(K=4))", "needs a column"),
        ('max(step().K - step(K=(4, 8), case="LoRA").K)', "of the same rows"),
        ("abs(step(K=4))", "needs figures"),
        ('step(case="LoRA", K=8).ms > 2000', "must be a finite number"),
        ('sum(each(design="a").each < each(design="c").each)', "of the same rows"),
        ("1 < 2 < 3", "not one of the forms"),
        ('log("[0-9] s")', "needs one group"),
        ('log("([0-9]) W")', "0 matches"),
        ('log("([0-9]+)")', "selects 5 rows"),
        ('log("(")', "no regular expression"),
        ('step("(1)")', "is no text"),
        ('log("(steps)")', "must be a number"),
        ("2 ** 8", "not one of the forms"),
    ],
)
def test_figure__refuses_what_is_not_one_figure(step, expression, problem):
    with pytest.raises(ValueError, match=problem):
        figure(expression, step)


@pytest.mark.parametrize(
    ("text", "value", "written"),
    [
        ("2097", 2096.6, "2097"),
        ("1.54", 1.4, "1.40"),
        (".37", 0.4149, ".41"),
        (".9", 1.04, "1.0"),
        ("0.5", 0.06, "0.1"),
        ("+4", 3.6, "+4"),
        ("+4", -3.6, "-4"),
        ("-.2", -0.34, "-.3"),
        ("7,473", 12345.6, "12,346"),
        ("1.8e-5", 1.23456e-7, "1.2e-7"),
        ("3e+2", 512.0, "5e2"),
    ],
)
def test_written_as__keeps_the_form_of_the_number(text, value, written):
    assert written_as(text, value) == written


def test_filled__replaces_marked_numbers_and_says_what_changed(step):
    text = SOURCE + 'A\nstep **17.0<!-- =step(case="LoRA",\n K=8).ms / 100 -->** ms and 2097 ms'
    made = filled(text, no_table)
    assert made.text == text.replace("17.0", "21.0")
    assert [(found.line, found.text) for found in made.changes] == [
        (4, '17.0 is 21.0 in step(case="LoRA", K=8).ms / 100')
    ]
    assert not made.errors
    again = filled(made.text, no_table)
    assert (again.text, again.changes, again.errors) == (made.text, [], [])


def test_filled__makes_marked_tables_anew_and_leaves_the_rest():
    tables = {"g.one": "| 1 |", "g.two": "| 2 |"}
    page = "a\n<!-- table: g.one -->\nold\n<!-- end -->\nb <!-- table: g.two --><!-- end -->"
    once = filled(page, tables.__getitem__)
    assert once.text == (
        "a\n<!-- table: g.one -->\n\n| 1 |\n\n<!-- end -->\nb <!-- table: g.two -->\n\n| 2 |\n\n<!-- end -->"
    )
    assert [found.line for found in once.changes] == [2, 5]
    assert not filled(once.text, tables.__getitem__).changes


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        (SOURCE + '5<!-- =step(case="LoRA").ms -->', "3: .*selects 2 rows"),
        (SOURCE + '5 <!-- =step(case="LoRA", K=8).ms -->', "3: no number stands right before"),
        (SOURCE + "5<!-- =step(K=8, case='LoRA').ms\n- 1 -->", "3: a line of a mark begins"),
        (SOURCE, "1: no mark uses source 'step'"),
        (SOURCE + SOURCE, "1: source 'step' is named twice"),
        ("<!-- source: max = step.csv -->\n5<!-- =max(max().ms) -->", "cannot be called 'max'"),
        ("<!-- source: step = steps.csv -->\n5<!-- =step().ms -->", "2: there is no steps.csv"),
        ("a\n<!-- table: none --><!-- end -->", "2: no table is called 'none'"),
        ("a\n\n<!-- table: g.one -->\n| 1 |", "3: .*has no end"),
        ("<!-- source: Step = step.csv -->", "is no mark"),
        ("<!-- sauce: step = step.csv -->", "is no mark"),
    ],
)
def test_filled__names_the_line_of_what_it_cannot_make(step, page, problem):
    found = [f"{error.line}: {error.text}" for error in filled(page, no_table).errors]
    assert any(re.search(problem, error) for error in found), found


def test_filled__leaves_code_alone(step):
    code = "5<!-- =no.such -->"
    page = f"a `{code}`\n\n    {code}\n\n```\n{code}\n\n<!-- table: x --><!-- end -->\n```\n"
    made = filled(page, no_table)
    assert (made.text, made.changes, made.errors) == (page, [], [])


FIGURES = [
    "it takes 2037 ms",
    "1.4 to 1.9 times as fast",
    "94, 95 and 98 %",
    "a factor of 3x",
    "22.4\nGiB",
    "3.0 TB/s",
    "7813 tokens/s",
    "58 %",
    "at 700 W",
    "a mean of .37",
    "a ratio = 0.37",
    "in 12 ns, 30 percent of them",
    "lower in 38 of 40",
    "9 of the 10 models",
    "an error of 1.8e-5 or so",
    "| 12 | a |\n",
    "| **0.84, 1.71** | a |\n",
    "| 6.78 (1.16), 4 | a |\n",
]


@pytest.mark.parametrize("text", FIGURES)
def test_unmarked__finds_every_number_of_a_figure(text):
    numbers = re.findall(r"\d*\.?\d+(?:e-\d)?", text)
    found = unmarked(f"Line.\n\n{text}", ())
    assert [known.text.split("'")[1] for known in found] == numbers
    assert found[0].line == 3


@pytest.mark.parametrize("text", FIGURES)
def test_unmarked__a_mark_is_enough(text):
    marked = re.sub(r"(\d*\.?\d+(?:e-\d)?)", r"\1<!-- =step(\n K=8).ms -->", text)
    assert not unmarked(marked, ())


def test_unmarked__one_bare_number_among_marked_ones():
    text = "94<!-- =a -->, 95 and 98<!-- =b --> %, lower in 8<!-- =c --> of 10, 7 of 9<!-- =d -->, 5 of 6"
    assert [found.text.split("'")[1] for found in unmarked(text, ())] == ["95", "10", "7", "5", "6"]


@pytest.mark.parametrize(
    "text",
    [
        "K = 8 samples of 512 tokens, torch 2.11, arXiv 2505.19223, beta = 0.2, 27 November 2026",
        "`2037 ms`",
        "torch >= 2.11, betas 0.9, [a paper](https://arxiv.org/abs/2505.19223)",
        "a\n\n    2037 ms\n\nb",
        "```\n2037 ms\n\n12 s\n```",
        "<!-- table: g.one -->\n| 2037 ms |\n<!-- end -->",
        "| K = 8 | LLaDA 8B |\n",
        "a (32 x 32) grid, revision 4fd4141",
    ],
)
def test_unmarked__leaves_settings_code_and_marked_tables(text):
    assert not unmarked(text, ())


def test_unmarked__allows_a_phrase_over_line_breaks_and_nothing_beside_it():
    allowances = [Allowed("page", "a card of 80 GB", "its data sheet")]
    assert not unmarked("On a card of\n80 GB it runs.", allowances)
    found = unmarked("On a card of 80 GB it takes 70 GB, on a card of 90 GB 71.", allowances)
    assert [known.text.split("'")[1] for known in found] == ["70", "90"]


def test_unmarked__an_allowance_that_nothing_needs_fails():
    text = "On a card of 80 GB."
    for phrase in ("a card of 90 GB", "On a card"):
        (found,) = unmarked("no figure " + text[:9], [Allowed("page", phrase, "why")])
        assert found.text == f"nothing needs the allowance {phrase!r}"


def test_pages__writes_what_check_names(step, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(SOURCE + '1<!-- =step(case="LoRA", K=8).ms --> ms\n')
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "ALLOWED", ())
    assert command.main(["--check", str(page)]) == 1
    assert capsys.readouterr().out == 'page.md:3: 1 is 2097 in step(case="LoRA", K=8).ms\n'
    assert command.main([str(page)]) == 0
    assert "2097<!-- =step" in page.read_text()
    capsys.readouterr()
    assert command.main(["--check", str(page)]) == 0
    assert capsys.readouterr().out == ""
    page.write_text(page.read_text() + "\nand 3 s\n")
    assert command.main([str(page)]) == 1
    assert capsys.readouterr().out.startswith("page.md:5: no mark for '3'")
    monkeypatch.setattr(command, "ALLOWED", (Allowed("page.md", "and 3 s", "a setting"),))
    assert command.main(["--check", str(page)]) == 0


def test_allowed__is_of_pages_there_are_and_gives_reasons():
    known = {command.name_of(page) for page in command.PAGES}
    assert {entry.page for entry in allowed.ALLOWED} <= known
    assert all(entry.why for entry in allowed.ALLOWED)
    assert len({(entry.page, entry.phrase) for entry in allowed.ALLOWED}) == len(allowed.ALLOWED)
