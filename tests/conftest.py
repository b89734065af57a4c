"""What holds for all tests: the same examples and the same signals wherever and however they are run."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# Hypothesis tries the same examples each time, and how busy the machine is decides nothing.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

# A shell without job control has its background jobs ignore SIGINT, and what they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
