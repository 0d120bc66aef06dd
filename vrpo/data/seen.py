"""Which example ids a stream gave already, in at most 512 MiB however long it is."""

import numpy as np

_BITS = 16


class SeenIds:
    """A set of numbers below 2**32: one bit each, in blocks of 2**16 that exist where something was added."""

    def __init__(self):
        self._blocks: dict[int, np.ndarray] = {}

    def add(self, number: int) -> bool:
        """Whether it was new."""
        key = number >> _BITS
        if key not in self._blocks:
            self._blocks[key] = np.zeros(2**_BITS // 8, np.uint8)
        block = self._blocks[key]
        place, bit = (number & (2**_BITS - 1)) >> 3, 1 << (number & 7)
        is_new = not block[place] & bit
        block[place] |= bit
        return is_new
