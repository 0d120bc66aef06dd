"""One benchmark of every public operation of `vrpo_kernels`, for pytest-benchmark and for `compare`.

    pytest benchmarks/micro --benchmark-only [--device cpu] [--threads 1] [--sizes tiny] [-k rotary]
        [--benchmark-save NAME] [--benchmark-compare=0001 --benchmark-compare-fail=min:30%]

`micro.py` says what a benchmark is; `heads.py`, `elbos.py` and `tokens.py` hold them; `test_micro.py` checks
and times each. An operation has a figure only if its results pass: the tolerance policy for floating-point
ones, equal bits for the others.
"""
