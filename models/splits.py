"""Splits that no image crosses: a record without a split gets one from the content of its images.

    python -c "from models.splits import assign_splits as a; print(a([(None, ['5f3a']), (None, ['5f3a'])]))"

An image belongs to one split, for every question about it. Records that share an image go together, directly
or through others. The split follows from a hash, so that it does not depend on order, and records that are
added later leave the others where they are (unless they tie two groups of images together).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
"""Shares of images, by default."""

Wanted = tuple[str | None, Sequence[str]]
"""The split that a record asks for (None: any) and the content hashes of its images."""


def assign_splits(records: Sequence[Wanted], shares: Mapping[str, float] = SHARES) -> list[str | None]:
    """The split of every record; None for a record whose images stand in two splits.

    A record that names its split keeps it, unless an earlier one claimed one of its images for another split.
    """
    owners: dict[str, str] = {}
    splits: list[str | None] = [None] * len(records)
    for number, (split, images) in enumerate(records):
        if split and all(owners.get(image, split) == split for image in images):
            owners.update(dict.fromkeys(images, split))
            splits[number] = split
    groups = _groups([images for split, images in records if split is None])
    claims: dict[str, set[str]] = {}
    for image, group in groups.items():
        claims.setdefault(group, set()).update({owners[image]} if image in owners else ())
    for number, (split, images) in enumerate(records):
        if split is None:
            group = groups[images[0]]
            claimed = claims[group] or {split_of(group, shares)}
            splits[number] = next(iter(claimed)) if len(claimed) == 1 else None
    return splits


def split_of(key: str, shares: Mapping[str, float] = SHARES) -> str:
    """Split of a key, by hash: a key keeps its split as long as the shares stay."""
    total = sum(shares.values())
    point = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 * total
    for name, share in shares.items():
        point -= share
        if point < 0:
            return name
    return list(shares)[-1]


def _groups(rows: Sequence[Sequence[str]]) -> dict[str, str]:
    """For every image the smallest image of its group, where images of one row are in one group."""
    parent: dict[str, str] = {}

    def find(image: str) -> str:
        while parent.setdefault(image, image) != image:
            parent[image] = image = parent[parent[image]]
        return image

    for images in rows:
        for image in images:
            low, high = sorted((find(images[0]), find(image)))
            parent[high] = low
    return {image: find(image) for image in parent}
