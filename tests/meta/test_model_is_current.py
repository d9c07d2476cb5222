"""The models of the slot protocol know the C as it is.

A model proves nothing of code that has moved on.  So a change to the protocol's C fails here until
somebody has compared it with the models, and said so.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from model import check

MODELS = sorted(check.HERE.glob("*.pml"))

WHAT_TO_DO = """
The models of the slot protocol may not be true any more:
  {}
Compare each with the steps that name it in tests/model/*.pml and litmus.py.  If they differ, change
the model first and run `make model`.  Then: python3 tests/model/check.py --reviewed"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the headers, to be changed, all of it reviewed."""
    for header in check.HEADERS:
        shutil.copyfile(check.SOURCES / header, tmp_path / header)
    monkeypatch.setattr(check, "SOURCES", tmp_path)
    monkeypatch.setattr(check, "REVIEWED", tmp_path / "reviewed.json")
    check.note_reviewed()
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_somebody_has_compared_the_core_with_the_models() -> None:
    changes = check.unreviewed()
    assert not changes, WHAT_TO_DO.format("\n  ".join(changes))


def test_a_changed_order_of_steps_is_noticed(sources: Path) -> None:
    edit(sources / "_slots_supervisor.h", "store_release(&s->m.status[x].st, st_word(p->", "(")
    edit(sources / "_slots_client.h", "and_acq_rel(hints, ~bit)", "or_release(hints, ~bit)")
    edit(sources / "_slots.h", "alignas(64) word_t sleep;", "word_t sleep;")
    assert check.unreviewed() == [
        "_slots.h: outbox_t has changed",
        "_slots_client.h: client_claim_hinted has changed",
        "_slots_supervisor.h: supervisor_free has changed",
    ]


def test_new_and_lost_functions_are_noticed(sources: Path) -> None:
    with (sources / "_slots_client.h").open("a") as header:
        header.write("static inline void\nclient_steal(client_t *c)\n{\n    c->cid++;\n}\n")
    edit(sources / "_slots.h", "\nreq_word(", "\nmake_req_word(")
    assert check.unreviewed() == [
        "_slots.h: make_req_word is new",
        "_slots.h: req_word is gone",
        "_slots_client.h: client_steal is new",
    ]


def test_comments_and_blanks_do_not_count(sources: Path) -> None:
    edit(sources / "_slots_client.h", "client_ring(client_t *c,", "client_ring(client_t *c /**/ ,")
    edit(sources / "_slots.h", "#define CIDS            4096", "#define CIDS 4096 /* many */")
    assert check.unreviewed() == []


def test_what_is_kept_apart_exists() -> None:
    present: set[str] = set()
    for header in check.HEADERS:
        present |= check.declarations((check.SOURCES / header).read_text()).keys()
    assert present >= check.APART


def test_the_models_name_only_functions_that_exist() -> None:
    present: set[str] = set()
    for header in check.HEADERS:
        present |= check.declarations((check.SOURCES / header).read_text()).keys()
    named: set[str] = set()
    for path in [*MODELS, check.HERE / "litmus.py"]:
        named |= set(
            re.findall(r"\b(?:client|supervisor|detail|map|record)_[a-z_]+\b", path.read_text())
        )
    # Variables of the models.
    assert named - present == {"supervisor_dead", "supervisor_crashes"}


def test_every_seeded_bug_is_tried_and_explained() -> None:
    for path in MODELS:
        head, _, body = path.read_text().partition("*/")
        explained = set(re.findall(r"BUG_(\w+) ", head))
        seeded = set(re.findall(r"BUG_(\w+)", body))
        tried = {c.bug for c in check.BUGS if c.model == path.stem}
        assert explained == seeded == tried, path.name
