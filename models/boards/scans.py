"""Handwritten digits and boards made of them.

The 1,797 scans are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI
Machine Learning Repository, CC BY 4.0), as scikit-learn ships them: 8 x 8 pixels, 17 grey levels, 13 writers.

    python -c "from models.boards.scans import split_scans; print({k: len(v) for k, v in split_scans().items()})"
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

SIDE = 3
"""Cells along one side of a board."""
CELL_PX = 16
"""Pixels along one side of a cell; a scan is drawn at twice its 8 pixels."""

POOLS = {"foundation": 0.50, "generate": 0.125, "rounds": 0.125, "validation": 0.08, "test": 0.17}
"""Share of the scans by pool. No scan is in two pools, so that every later stage meets handwriting its policy
was not trained on, and the evaluation sets are unseen."""


@cache
def load_scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All scans as grey images [1797, 8, 8] (0 = paper, 255 = ink) and their digits [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target.astype(np.int64)


@cache
def split_scans(seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Scan indices by pool, stratified by digit; the pools are disjoint and together hold every scan."""
    _, labels = load_scans()
    generator = np.random.default_rng(seed)
    parts: dict[str, list[NDArray[np.int64]]] = {pool: [] for pool in POOLS}
    bounds = np.cumsum([0.0, *POOLS.values()])
    for digit in range(10):
        indices = generator.permutation(np.flatnonzero(labels == digit))
        cuts = np.round(bounds * len(indices)).astype(int)
        for pool, start, end in zip(POOLS, cuts, cuts[1:], strict=False):
            parts[pool].append(indices[start:end])
    return {pool: np.sort(np.concatenate(chunks)) for pool, chunks in parts.items()}


def pick_scans(digits: NDArray[np.int64], pool: str, generator: np.random.Generator) -> NDArray[np.int64]:
    """A scan index of the pool for every wanted digit; same shape as `digits`."""
    _, labels = load_scans()
    members = split_scans()[pool]
    by_digit = [members[labels[members] == digit] for digit in range(10)]
    return np.array([generator.choice(by_digit[digit]) for digit in digits.ravel()]).reshape(digits.shape)


def draw_board(
    scans: NDArray[np.int64],
    generator: np.random.Generator | None = None,
    jitter_px: int = 2,
    turn: float = 0.0,
) -> NDArray[np.uint8]:
    """Draw a board: dark ink on light paper, [SIDE * CELL_PX, SIDE * CELL_PX] grey.

    scans: [SIDE, SIDE] scan indices. With a generator every digit is shifted by up to `jitter_px` pixels and
    sheared by up to `turn` (fraction of its height); without one it stands in the middle of its cell.
    """
    images, _ = load_scans()
    board = np.zeros((SIDE * CELL_PX, SIDE * CELL_PX), dtype=np.uint8)
    for row in range(SIDE):
        for column in range(SIDE):
            cell = np.kron(images[scans[row, column]], np.ones((2, 2), dtype=np.uint8))
            if generator is not None:
                cell = _move(cell, generator, jitter_px, turn)
            board[row * CELL_PX : (row + 1) * CELL_PX, column * CELL_PX : (column + 1) * CELL_PX] = cell
    return 255 - board


def _move(
    cell: NDArray[np.uint8], generator: np.random.Generator, jitter_px: int, turn: float
) -> NDArray[np.uint8]:
    """Shift and shear one cell; ink that leaves the cell is cut off, never wrapped into the other side."""
    down, right = generator.integers(-jitter_px, jitter_px + 1, size=2)
    slant = generator.uniform(-turn, turn)
    moved = np.zeros_like(cell)
    for y in range(CELL_PX):
        source = y - down
        if not 0 <= source < CELL_PX:
            continue
        shift = int(right + round(slant * (y - CELL_PX / 2)))
        line = np.roll(cell[source], shift)
        if shift > 0:
            line[:shift] = 0
        elif shift < 0:
            line[shift:] = 0
        moved[y] = line
    return moved
