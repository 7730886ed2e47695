"""What all tests share: nothing of the developer's environment, and random tests that repeat.

Random tests are hypothesis tests. Their profile is derandomized, so the same commit tries the same examples everywhere; a
failing one prints its example and the blob that reproduces it. `HYPOTHESIS_PROFILE=search` looks for new ones (and
`pytest --hypothesis-seed=N` repeats such a run).
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

for _name in [name for name in os.environ if name.startswith("HUBPEER_")]:
    del os.environ[_name]

_slow_machines = [HealthCheck.too_slow]
settings.register_profile(
    "repeat", derandomize=True, deadline=None, print_blob=True, database=None, suppress_health_check=_slow_machines
)
settings.register_profile("search", max_examples=2000, deadline=None, print_blob=True, suppress_health_check=_slow_machines)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


def pytest_report_header() -> str:
    return f"random tests: profile {settings.get_current_profile_name()}, seed derived from each test's source"
