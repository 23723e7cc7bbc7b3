"""What property tests may take."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# By default an example fails that takes longer than 200 ms, and a test whose examples take long to
# draw. On a busy machine any of them may.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")
