"""Measurements of this project against its rivals. `python -m benchmarks` lists them."""
