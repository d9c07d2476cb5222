"""No inbox, whatever is in it, breaks the supervisor's side or stays broken.

core/images.c runs the shipped core under the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import pytest

from fix_trials import Trial
from support.core_bugs import BUGS
from support.core_programs import bugs_for, build, must_find, run, tell

pytestmark = pytest.mark.xdist_group("core")
LONG = pytest.mark.at_least("fault")


@pytest.mark.timeout_s(7200)
@pytest.mark.parametrize(
    "variant", [None, pytest.param("short-slices", marks=LONG)], ids=["shipped", "short-slices"]
)
def test_T04_no_image_of_the_inbox_breaks_the_supervisor(trial: Trial, variant: str | None) -> None:
    """Short slices: the sweep's slices end after two events, not after a thousand."""
    images = trial.pick(60_000, 1_000_000 if variant is None else 200_000, 20_000_000)
    report = run(build("images", "address", variant=variant), trial.seed, images, timeout=7000)
    tell(trial, report)
    if not report.problems:
        assert all(report.figures[what] for what in ("accepted", "refused", "repaired"))
        trial.note(
            "{accepted} accepted, {refused} refused, {repaired} repaired, {scribbles} stores "
            "during looks".format(**report.figures)
        )


@LONG
@pytest.mark.parametrize("bug", bugs_for("images"))
def test_T04_random_images_find_the_seeded_bug(trial: Trial, bug: str) -> None:
    made = build("images", "address", bug, BUGS[bug].found_by["images"] or None)
    # It stops at the first that it finds; some are rare.
    must_find(trial, run(made, trial.seed, 600_000, timeout=300))
