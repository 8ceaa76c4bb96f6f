"""Test-wide settings: how many random cases, and no time limit on a case (machines are shared)."""

import os

from hypothesis import HealthCheck, settings

_QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
settings.register_profile("short", max_examples=25, **_QUIET)
settings.register_profile("long", max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def pytest_report_header() -> str:
    """Says which devices these tests run on, and which not."""
    from reference import DEVICES

    missing = [device for device in ("cuda",) if device not in DEVICES]
    return f"devices: {', '.join(DEVICES)}" + (f"; NOT TESTED: {', '.join(missing)}" if missing else "")


# The tests of the Ascend path run on stand-ins alone: `make test-ascend`.
collect_ignore = [] if os.environ.get("ASCEND_HOST") == "1" else ["ascend_host"]
