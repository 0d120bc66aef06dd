"""README.md and docs/*.md from the committed result files: `python -m benchmarks pages`.

Two marks, both invisible once a page is rendered:

    <!-- table: NAME --> ... <!-- end -->       the text between is the table of that name (tables.py)
    1.54x  as  1.54<!-- =step(case="hand", K=4).ms / step(case="LoRA", K=4).ms -->x

The second is a figure: the number before the mark is what the expression gives, in as many decimals as the
number has (figures.py). The files of a page are named in it:

    <!-- source: step = gpu/h100-2026-11-27-first/step.csv -->

`--check` writes nothing and exits 1 where a page differs from its files or has a figure without a mark that
allowed.py does not name with a reason.
"""
