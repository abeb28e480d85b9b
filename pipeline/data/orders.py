"""Shuffled orders of any size, a place at a time.

A short order is a permutation in memory. A long one is a Feistel network over the numbers below
height · width, both near the root of the size, walked until it falls below the size (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). That is hardly ever more than one walk, and
takes no memory, whatever the size.
"""

import hashlib
import math
from functools import lru_cache

import numpy as np

from pipeline.types import Int64s

SHORT = 1 << 16  # items; a permutation of as many takes 512 KiB
ROUNDS = 4  # Luby and Rackoff, 1988: three make it look random, four also backwards
ALL = (1 << 64) - 1


def place(size: int, at: int, *seed: int) -> int:
    """The item at place `at` of the shuffled order of `size` items that these numbers name.

    A pure function of its arguments; over all `at` it gives each item once.
    """
    if size <= SHORT:
        return int(permutation(size, *seed)[at])
    keys, height, width = network(size, *seed)
    while True:
        row, column = divmod(at, width)
        for number in range(0, ROUNDS, 2):
            row = (row + mixed(column ^ keys[number])) % height
            column = (column + mixed(row ^ keys[number + 1])) % width
        at = row * width + column
        if at < size:
            return at


@lru_cache(maxsize=16)
def permutation(size: int, *seed: int) -> Int64s:
    """A short order, whole."""
    return np.random.default_rng(seed).permutation(size)


@lru_cache(maxsize=64)
def network(size: int, *seed: int) -> tuple[list[int], int, int]:
    """(a key of 64 bits for each round, height, width)"""
    data = b"".join(number.to_bytes(16, "little", signed=True) for number in (size, *seed))
    keys = np.frombuffer(hashlib.sha256(data).digest(), "<u8").tolist()
    width = math.isqrt(size - 1) + 1
    return keys, -(-size // width), width


def mixed(number: int) -> int:
    """A number of 64 bits whose every bit depends on all of `number`: splitmix64's last step."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & ALL
    number = (number ^ number >> 27) * 0x94D049BB133111EB & ALL
    return number ^ number >> 31
