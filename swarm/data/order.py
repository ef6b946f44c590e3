"""The order in which a run meets its samples: an endless, seeded sequence that anyone can index.

Position p lies in epoch p // n; within an epoch every sample comes exactly once, in a
permutation drawn from (seed, epoch, n) alone. So two machines that know the seed agree on every
batch, in whatever order they ask. Pure; keeps nothing but the last few permutations.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from swarm.ids import seed_from


def sample_index(position: int, n_samples: int, seed: int) -> int:
    """The sample that stands at a position of the run. Raises ValueError if there is none."""
    if position < 0 or n_samples < 1:
        raise ValueError(f"no sample at position {position} of {n_samples} samples")
    epoch, place = divmod(position, n_samples)
    return int(_permutation(n_samples, epoch, seed)[place])


@lru_cache(maxsize=4)
def _permutation(n_samples: int, epoch: int, seed: int) -> npt.NDArray[np.int64]:
    """Samples sorted by a 64-bit draw each, ties by index.

    numpy promises the raw stream of a bit generator for a given key, but not that of
    `Generator.permutation`, which may change between releases (NEP 19).
    """
    draws = np.random.Philox(key=seed_from("sample-order", seed, epoch, n_samples)).random_raw(n_samples)
    order = np.argsort(draws, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order
