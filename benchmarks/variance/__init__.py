"""How noisy the mask designs are, on models that were trained independently: `python -m benchmarks variance`.

models.py trains them, measure.py draws fresh masks, bound.py asks what weights of least variance would give,
run.py keeps one result file per model, and report.py turns those into tables and figures with intervals over
models and pairs. training.py compares training outcomes.
"""
