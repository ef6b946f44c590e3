"""How long a round waits: its deadline, when it asks for an end, and the grace after a quorum. Pure.

In: the times that pipelines took, in seconds. Out: seconds. The deadline is a multiple of the
median of recent rounds, so that it follows the volunteers' speed and one straggler does not
stretch it; each attempt that failed doubles it, so that volunteers who all became slower are not
shut out for good. The grace after a quorum follows the spread of those that are whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

RECENT = 16
"""Times of so many pipelines are looked at."""
FIRST_S = 1800.0
"""Before any pipeline was whole, nobody knows better."""
_MULTIPLE = 3.0
_LEAST_S = 30.0
_MOST_S = 24 * 3600.0
WRAP_UP_SHARE = 0.8
"""After so much of its time a round asks its pipelines to contribute what they have."""
_LEAST_GRACE_S = 5.0
_GRACE_SHARE = 0.2
_GRACE_SPREADS = 1.5


def limit_s(fixed_s: float | None, recent_s: Sequence[float], attempt: int) -> float:
    """Time of a round: what the job file says, or None for what the recent pipelines took.

    `attempt` counts the formings of this round that failed before.
    """
    if fixed_s is not None:
        return fixed_s
    expected_s = _MULTIPLE * median(recent_s[-RECENT:]) if recent_s else FIRST_S
    # Capped before it is doubled: 2**attempt of a job that was resumed often is no float.
    return float(min(_MOST_S, max(_LEAST_S, expected_s) * 2 ** min(attempt, 12)))


def quorum_of(share: float, formed: int) -> int:
    """Pipelines that must be whole before the others are only waited for as long as the grace."""
    # 0.7 × 10 is a little more than 7 in floating point.
    return max(1, math.ceil(share * formed - 1e-9))


def grace_s(took_s: Sequence[float]) -> float:
    """How much longer the rest may take, from the times of the pipelines that are whole."""
    if not took_s:
        return _LEAST_GRACE_S
    spread_s = max(took_s) - min(took_s)
    return max(_LEAST_GRACE_S, _GRACE_SHARE * median(took_s), _GRACE_SPREADS * spread_s)
