"""Real processes killed at random moments, in short; `make chaos` is the long version."""

import pytest
from chaos import chaos


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kills_at_random_moments_lose_nothing() -> None:
    counts = chaos(kills=12, seed=3, most_in_a_run=12)
    assert sum(counts[name] for name in ("SIGKILL", "SIGTERM", "SIGUSR1")) == 12
    assert counts["cut saves"] >= 2
