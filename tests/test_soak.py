"""Some of the soak in every run of the suite, with a seed of the day: nothing is lost, doubled or left behind.

``SOAK_SEED=7 pytest tests/test_soak.py`` takes that seed, and ``SOAK_MINUTES`` another time;
``python -m tests.soak --help`` has more.
"""

from __future__ import annotations

import datetime
import os

import pytest

from tests.soak import soak

SEED = int(os.environ.get("SOAK_SEED") or datetime.datetime.now(datetime.UTC).strftime("%Y%m%d"))
MINUTES = float(os.environ.get("SOAK_MINUTES") or 1)
RATE = 5.0  # visits a second, for there are other tests beside it


@pytest.mark.soak
@pytest.mark.timeout(240 + 60 * MINUTES)
def test_nothing_is_lost_doubled_or_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    all_is_well = soak(MINUTES, sessions=100, seed=SEED, rate=RATE)
    report = capsys.readouterr().out
    assert all_is_well, report
