"""The VRPO step against public code and a hand assembly, by technique: `python -m benchmarks step`.

Read in this order: `lengths.py` (pairs), `setup.py` (models and sizes), `rivals.py` (how others compute the
step), `variants.py` (what is compared), `floors.py` (what it must cost), `bench.py` (gate, clock, rows).
"""
