"""Handwritten digits and boards made of them.

The 1,797 scans are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI
Machine Learning Repository, CC BY 4.0), as scikit-learn ships them: 8 x 8 pixels, 17 grey levels, 13 writers.

    python -c "from models.boards.scans import split_scans; \
        print({k: len(v) for k, v in split_scans().items()})"
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
    cells = images[scans].repeat(2, axis=2).repeat(2, axis=3).reshape(-1, CELL_PX, CELL_PX)
    if generator is not None:
        cells = _move(cells, generator, jitter_px, turn)
    board = cells.reshape(SIDE, SIDE, CELL_PX, CELL_PX).swapaxes(1, 2).reshape(SIDE * CELL_PX, SIDE * CELL_PX)
    return 255 - board


def _move(
    cells: NDArray[np.uint8], generator: np.random.Generator, jitter_px: int, turn: float
) -> NDArray[np.uint8]:
    """Shift and shear cells [n, CELL_PX, CELL_PX]; ink that leaves its cell
    is cut off, never wrapped around."""
    count = len(cells)
    down, right = generator.integers(-jitter_px, jitter_px + 1, size=(2, count, 1, 1))
    slant = generator.uniform(-turn, turn, size=(count, 1, 1))
    y, x = np.mgrid[:CELL_PX, :CELL_PX]
    from_y = np.broadcast_to(y - down, cells.shape)
    from_x = x - right - np.round(slant * (y - CELL_PX / 2)).astype(int)
    inside = (from_y >= 0) & (from_y < CELL_PX) & (from_x >= 0) & (from_x < CELL_PX)
    moved = cells[np.arange(count)[:, None, None], from_y.clip(0, CELL_PX - 1), from_x.clip(0, CELL_PX - 1)]
    return np.where(inside, moved, 0).astype(np.uint8)
