"""Bugs to seed into the slot protocol, each a replaced piece of a header's text.

A suite that finds none of them shows nothing.  Every bug names the programs of tests/fault/core/
that must find it, for killstep with the operation that shows it, for images with the variant of the
build; tests/meta/test_core_bugs.py keeps the table true to the headers.
"""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    header: str
    old: str
    new: str
    found_by: dict[str, str]  # program: operation, or variant
    more: tuple[tuple[str, str], ...] = ()  # further replacements

    def seed(self, text: str) -> str:
        for old, new in ((self.old, self.new), *self.more):
            assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
            text = text.replace(old, new)
        return text


CLIENT, SUPERVISOR = "_slots_client.h", "_slots_supervisor.h"

BUGS = {
    # --- what a death leaves behind ---------------------------------------------------------
    "no-reclaim": Bug(
        SUPERVISOR,
        "req_state(w) == REQ_CLAIMED && owner == CID_GONE",
        "req_state(w) == REQ_INVALID && owner == CID_GONE",
        {"killstep": "register"},
    ),
    "cid-freed-before-the-round": Bug(
        SUPERVISOR,
        "s->cids[cid].due > s->swept",
        "s->cids[cid].due > s->swept + s->m.g.nslots",
        {"killstep": "register"},
    ),
    "token-leaked-by-a-death": Bug(
        SUPERVISOR,
        "if (p->slot == 0 && load_acquire(&s->m.tokens[t].req) ==",
        "if (p->slot == 0 && ~load_acquire(&s->m.tokens[t].req) ==",
        {"killstep": "register-parallel"},
    ),
    "lost-hint-stays-lost": Bug(
        SUPERVISOR,
        "or_release(&s->m.hints[x / 64], bit);       /* I9: a lost hint */",
        "(void) bit;",
        {"killstep": "register-without-hints", "images": ""},
    ),
    "payload-after-publish": Bug(
        CLIENT,
        "    words_store(to->payload, from->payload, from->payload_len);\n",
        "",
        {"killstep": "register"},
        more=(
            (
                "    store_relaxed(&c->next, *slot + 1);\n",
                "    words_store(to->payload, from->payload, from->payload_len);\n"
                "    store_relaxed(&c->next, *slot + 1);\n",
            ),
        ),
    ),
    "claimed-without-naming-the-token": Bug(
        CLIENT,
        "return cas_acq_rel(req, w, req_word(*generation, c->cid, token, REQ_CLAIMED));",
        "return cas_acq_rel(req, w, req_word(*generation, c->cid, token & 0, REQ_CLAIMED));",
        {"killstep": "register-parallel"},
    ),
    # --- handles ----------------------------------------------------------------------------
    "terminate-any-generation": Bug(
        CLIENT,
        "if (word_generation(w) != generation || req_state(w) != REQ_READY)\n"
        "            return false;\n        if (w & REQ_TERM)",
        "if (req_state(w) != REQ_READY)\n            return false;\n        if (w & REQ_TERM)",
        {"killstep": "terminate-stale"},
    ),
    "terminate-by-a-store": Bug(
        CLIENT,
        "if (cas_acq_rel(req, w, w | REQ_TERM)) {",
        "store_seq_cst(req, w | REQ_TERM);\n        {",
        {"killstep": "terminate"},
    ),
    "inbox-freed-before-the-outbox": Bug(
        SUPERVISOR,
        "    store_release(&s->m.status[x].st, st_word(p->generation, ST_NONE, 0));\n"
        "    if (counted)",
        "    exchange_acq_rel(&s->m.controls[x].req, req_word(p->generation, 0, 0, REQ_FREE));\n"
        "    store_release(&s->m.status[x].st, st_word(p->generation, ST_NONE, 0));\n"
        "    if (counted)",
        {"killstep": "supervisor-free"},
    ),
    # --- refusals ---------------------------------------------------------------------------
    "nfree-raised-outside-the-bracket": Bug(
        SUPERVISOR,
        "    if (counted)\n"
        "        store_release(&o->nfree, load_relaxed(&o->nfree) + 1);\n"
        "    exchange_acq_rel(&s->m.controls[x].req, req_word(p->generation, 0, 0, REQ_FREE));\n"
        "    store_release(&o->free_seq, free_seq + 2);\n",
        "    exchange_acq_rel(&s->m.controls[x].req, req_word(p->generation, 0, 0, REQ_FREE));\n"
        "    store_release(&o->free_seq, free_seq + 2);\n"
        "    if (counted)\n"
        "        store_release(&o->nfree, load_relaxed(&o->nfree) + 1);\n",
        {"killstep": "supervisor-free"},
    ),
    "refused-whatever-was-freed": Bug(
        CLIENT,
        "if ((free_seq & 1) || load_relaxed(&c->m.outbox->free_seq) != free_seq)",
        "if (free_seq == ~UINT64_C(0))",
        {"killstep": "register-without-hints"},
    ),
    # --- doorbells --------------------------------------------------------------------------
    "asleep-without-a-second-look": Bug(
        SUPERVISOR,
        "if (load_seq_cst(&s->m.dirty[i]) != 0) {",
        "if (load_seq_cst(&s->m.dirty[i]) != 0 && i > 0) {",
        {"killstep": "supervisor-sleep"},
    ),
    "rung-before-the-bit-is-set": Bug(
        CLIENT,
        "    or_seq_cst(&c->m.dirty[slot / 64], UINT64_C(1) << (slot % 64));\n",
        "",
        {"killstep": "register-while-it-lies-down"},
        more=(
            (
                "        store_relaxed(&c->rung, sleep);\n    }\n",
                "        store_relaxed(&c->rung, sleep);\n    }\n"
                "    or_seq_cst(&c->m.dirty[slot / 64], UINT64_C(1) << (slot % 64));\n",
            ),
        ),
    ),
    # --- details ----------------------------------------------------------------------------
    "detail-read-once": Bug(
        "_slots.h",
        "if (load_relaxed(&shared->seq) == seq)",
        "if (seq || !seq)",
        {"killstep": "detail"},
    ),
    # --- what may be in an inbox ------------------------------------------------------------
    "length-of-the-entry-unchecked": Bug(
        SUPERVISOR,
        "    if (r->entry_len < sizeof r->entry)\n",
        "    if (r->entry_len > 0)\n",
        {"images": ""},
    ),
    "payload-read-twice": Bug(
        SUPERVISOR,
        "words_load(r->payload, shared->payload, payload);",
        "words_load(r->payload, shared->payload, shared->payload_len);",
        {"images": ""},
    ),
    "dirty-bit-of-no-slot": Bug(
        SUPERVISOR,
        "bits &= (UINT64_C(1) << (g->nslots % 64)) - 1;",
        "bits &= ~UINT64_C(0);",
        {"images": ""},
    ),
    "token-out-of-range": Bug(
        SUPERVISOR,
        "if (token > s->m.g.ntokens || s->tokens[token - 1].slot != 0 ||",
        "if (s->tokens[token - 1].slot != 0 ||",
        {"images": ""},
    ),
    "token-bound-twice": Bug(
        SUPERVISOR,
        "if (token > s->m.g.ntokens || s->tokens[token - 1].slot != 0 ||",
        "if (token > s->m.g.ntokens ||",
        {"images": ""},
    ),
    "generation-taken-from-the-inbox": Bug(
        SUPERVISOR,
        "*p = (slot_t) {.generation = p->generation + 1};",
        "*p = (slot_t) {.generation = 1 + word_generation(load_acquire(&s->m.controls[x].req))};",
        {"images": ""},
    ),
    # --- the sweep --------------------------------------------------------------------------
    "short-slice-taken-for-whole": Bug(
        SUPERVISOR,
        "    for (uint32_t i = 0; i < max && i < s->m.g.nslots && n < SLICE_EVENTS; i++) {\n",
        "    uint64_t whole = s->swept + (max < s->m.g.nslots ? max : s->m.g.nslots);\n\n"
        "    for (uint32_t i = 0; i < max && i < s->m.g.nslots && n < SLICE_EVENTS; i++) {\n",
        {"images": "short-slices"},
        more=(
            (
                "    if (n == SLICE_EVENTS && s->swept >= s->sweep_until)\n",
                "    s->swept = whole;\n    if (n == SLICE_EVENTS && s->swept >= s->sweep_until)\n",
            ),
        ),
    ),
    "short-slice-asks-for-no-more": Bug(
        SUPERVISOR,
        "    if (n == SLICE_EVENTS && s->swept >= s->sweep_until)\n",
        "    if (n > SLICE_EVENTS)\n",
        {"images": "short-slices"},
    ),
    # --- memory -----------------------------------------------------------------------------
    "record-never-freed": Bug(
        SUPERVISOR,
        "    free(p->record);\n    if (p->generation == GENERATION_MAX)",
        "    if (p->generation == GENERATION_MAX)",
        {"cycles": "", "images": ""},
    ),
    # --- memory orders ----------------------------------------------------------------------
    "publish-relaxed": Bug(
        CLIENT,
        "if (!cas_acq_rel(&c->m.controls[*slot].req, claimed, claimed ^ REQ_CLAIMED ^ REQ_READY))",
        "if (!atomic_compare_exchange_strong_explicit(\n"
        "            &c->m.controls[*slot].req, &claimed, claimed ^ REQ_CLAIMED ^ REQ_READY,\n"
        "            memory_order_relaxed, memory_order_relaxed))",
        {"threads": ""},
    ),
    "look-relaxed": Bug(
        SUPERVISOR,
        "uint64_t w = load_acquire(req);     /* pairs with C3 in client_register() */",
        "uint64_t w = load_relaxed(req);",
        {"threads": ""},
    ),
    "status-relaxed": Bug(
        SUPERVISOR,
        "    store_release(&s->m.status[x].st,\n                  st_word(p->generation, state,",
        "    store_relaxed(&s->m.status[x].st,\n                  st_word(p->generation, state,",
        {"threads": ""},
    ),
}
