"""No inbox, whatever is in it, breaks the supervisor's side or stays broken.

core/images.c runs the shipped core under the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import pytest

from fix_trials import Trial
from support.core_programs import bugs_for, build, must_find, run, tell

pytestmark = pytest.mark.xdist_group("core")


@pytest.mark.timeout_s(1800)
def test_T04_no_image_of_the_inbox_breaks_the_supervisor(trial: Trial) -> None:
    images = trial.pick(60_000, 1_000_000, 20_000_000)
    report = run(build("images", "address"), trial.seed, images, timeout=1700)
    tell(trial, report)
    if not report.problems:
        assert all(report.figures[what] for what in ("accepted", "refused", "repaired"))
        trial.note(
            "{accepted} accepted, {refused} refused, {repaired} repaired, {scribbles} stores "
            "during looks".format(**report.figures)
        )


@pytest.mark.at_least("fault")
@pytest.mark.parametrize("bug", bugs_for("images"))
def test_T04_random_images_find_the_seeded_bug(trial: Trial, bug: str) -> None:
    must_find(trial, run(build("images", "address", bug), trial.seed, 60_000, timeout=50))
