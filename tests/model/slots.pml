/*
 * slots.pml - the slot protocol: words, generations, tokens, records, handles, waiters, deaths
 *
 * A model of _slots_client.h and _slots_supervisor.h.  One step has at most one access to shared
 * memory, so every interleaving of accesses is explored and SIGKILL hits between any two of them;
 * the comment at a step names the C function that it stands for.  What the two bitmaps, the sleep
 * word, the free count and the sweep's slices do is hints.pml: here a dirty bit wakes the
 * supervisor at once, and clients look for a slot word by word.
 *
 *   Client       client_take_token, client_find (its scan), client_claim, client_register,
 *                client_return_token, client_terminate, client_status; one process of one cid.
 *                SIGKILL at any step; its cid goes to a new process once it is free again.
 *   Memory       the record's relaxed stores wait in a buffer of the client and arrive at any time;
 *                a release waits for them (the weakest that ARM64 does).  They arrive after
 *                SIGKILL, too, but before the pidfd is readable.
 *   Supervisor   supervisor_look, _bind, _accept, _refuse, _publish, _free, _cid_gone, _sweep,
 *                _sweep_tokens, _collect_cids, _cid_new; launch, restart, exit and notification as
 *                its Python side does them.  May be killed at any step (SUPERVISOR_CRASHES).
 *   Waiter       in a third process: subscribe, then { drain, look, wait }; client_freed.
 *   Killer       SIGKILL; with CORRUPT, overwrites of the inbox by nasty values.
 *
 * Properties
 *   P1  No slot and no token has two owners; a live client's claim is never taken away.
 *   P2  At rest nothing is lost: every slot and token that no worker has is free (I2, I6, I11).
 *   P3  A handle never terminates a newer registration (I4), nor when generations are used up.
 *   P4  An accepted record is the one that was published: never torn, stale or late.
 *   P5  Published parallel registrations never exceed the tokens; accepted ones hold theirs (I6).
 *   P6  A waiter returns: its condition, or the supervisor's death.
 *   P7  What was published is accepted, or refused by a supervisor that says so; TERM takes effect.
 *   P8  A query never shows an older generation than its handle's (I3).
 *   P9  "Wait until gone, then register" meets the slot and the token free (client_freed).
 *   Besides: no deadlock but at rest; no endless execution (run with -DNP).
 *
 * Seeded bugs, each with the property that must catch it
 *   BUG_PUBLISH_RELAXED  C3 without release                                        P4
 *   BUG_COPY_FIRST       the record is copied before the word is loaded            P4
 *   BUG_EOF_IS_DEATH     end-of-file is taken for death: stores are under way      P4
 *   BUG_BLIND_CLAIM      C1 by store, not by compare-and-swap                      P1
 *   BUG_CID_EARLY        a dead client's cid is reused before its round            P2
 *   BUG_LIVE_CLAIM       a claim is taken from a live client                       P1
 *   BUG_NO_RECLAIM       a dead client's claim is not freed                        P2
 *   BUG_NO_COLLECT       a dead client's unbound token is not freed                P2
 *   BUG_NO_ROUND         a death starts no sweep; the dirty bit was not set yet    P7
 *   BUG_TOKENS_FIRST     a dead client's tokens are freed before its round is over P5
 *   BUG_NO_BIND          an accepted token is not bound: nobody gives it back      P2
 *   BUG_NO_GENERATION    client_terminate does not compare the generation          P3
 *   BUG_WRAP             a slot whose generations are used up starts again         P3
 *   BUG_ACK_STORE        accepting stores into the inbox word                      P7
 *   BUG_INBOX_FIRST      supervisor_free: the inbox word before the outbox's       P8
 *   BUG_TOKEN_LAST       supervisor_free: the token after the slot                 P9
 *   BUG_WAIT_OUTBOX      waits end on the outbox's word alone                      P9
 *   BUG_NOTIFY_FIRST     notification before the outbox's store                    P6
 *   BUG_LOOK_FIRST       the waiter looks, then drains, then waits                 P6
 *
 * Not modelled: what hints.pml and litmus.py model, several threads of a client, populating of
 * pages, the contents of records and details, shutdown.
 */
#ifndef NS
#define NS 2                    /* slots */
#endif
#ifndef NT
#define NT 1                    /* tokens */
#endif
#ifndef NC
#define NC 2                    /* clients */
#endif
#ifndef OPS
#define OPS 1                   /* operations of each cid, over all its processes */
#endif
#ifndef CRASHES
#define CRASHES 1               /* SIGKILLs of clients */
#endif
#ifndef SUPERVISOR_CRASHES
#define SUPERVISOR_CRASHES 0
#endif
#ifndef RESTARTS
#define RESTARTS 0              /* of workers */
#endif
#ifndef CORRUPT
#define CORRUPT 0               /* overwrites of the inbox */
#endif
#ifndef PARALLEL
#define PARALLEL 2              /* registrations: 0 none parallel, 1 all, 2 either */
#endif
#ifndef STUBBORN
#define STUBBORN 0              /* workers end on a signal only */
#endif
#ifndef GENERATION_MAX
#define GENERATION_MAX 99
#endif
#ifndef WAITERS
#define WAITERS 0
#endif

#define HONEST (CORRUPT == 0)

/* Bugs that leave words which cannot be are to be found by what a user sees, not by the
 * supervisor's own repair of such words. */
#if defined(BUG_BLIND_CLAIM) || defined(BUG_CID_EARLY) || defined(BUG_TOKENS_FIRST) || \
    defined(BUG_NO_BIND) || defined(BUG_ACK_STORE)
#define UNREPAIRED true
#else
#define UNREPAIRED HONEST
#endif

/* req_word(): generation | cid | token index + 1 | TERM | state */
#define FREE    1
#define CLAIMED 2
#define READY   3
#define REQ(g, c, k, t, s) ((g) * 128 + (c) * 32 + (k) * 8 + (t) * 4 + (s))
#define GENERATION(w) ((w) / 128)
#define CID(w)   (((w) / 32) % 4)
#define TOKEN(w) (((w) / 8) % 4)
#define TERM(w)  (((w) / 4) % 2)
#define STATE(w) ((w) % 4)

/* st_word(), without the pid */
#define ST_NONE     0
#define ST_ACCEPTED 1
#define ST_RUNNING  2
#define ST_STOPPED  3
#define ST_RETIRED  4
#define ST(g, s) ((g) * 8 + (s))

#define CID_FREE 0
#define CID_LIVE 1
#define CID_GONE 2

/* The inbox.  A record is the generation that it was written for. */
short req[NS];
short token_word[NT];
byte  record[NS];
bool  dirty[NS];
/* The outbox. */
short st[NS];
/* The kernel's: signals, pidfds, sockets. */
bool  killed[NC + 1], pidfd[NC + 1], idle[NC + 1];
bool  supervisor_dead;
bool  subscribing, message;
/* The clients' store buffers, of one record. */
byte  buffer_slot[NC + 1], buffer_value[NC + 1];        /* slot + 1 */

/* The supervisor's private memory: slot_t, token_t, cid_t. */
byte  p_generation[NS], p_state[NS], p_cid[NS], p_token[NS];
bool  p_terminate[NS], subscribed[NS];
byte  t_generation[NT], t_slot[NT];
byte  cid_state[NC + 1], due[NC + 1];                   /* due: words to go */

/* What is left to happen. */
byte  ops[NC + 1], crashes = CRASHES, supervisor_crashes = SUPERVISOR_CRASHES;
byte  restarts = RESTARTS, corrupt = CORRUPT;

/* What only the properties know. */
byte  owner[NS];                /* cid, between C1 and C3 */
bool  published[NS], is_parallel[NS], asked[NS];         /* asked: to terminate */
byte  parallel_published;
byte  handle_slot, handle_generation;                   /* the waiter's */
short handle_token;             /* its token's word, and 1000 x index + 1 */
#ifdef BUG_WRAP
byte  frees[NS];
#endif
byte  waiting;                  /* 1 for the start, 2 until gone, 3 returned */

proctype Memory()
{
#define ARRIVE(c) d_step { buffer_slot[c] > 0 -> record[buffer_slot[c] - 1] = buffer_value[c]; \
                           buffer_slot[c] = 0; buffer_value[c] = 0 }
end_memory:
    do
    :: ARRIVE(1)
#if NC > 1
    :: ARRIVE(2)
#endif
#if NC > 2
    :: ARRIVE(3)
#endif
    od
}

/* ------------------------------------------------------------------------------------------
 * Clients
 * ---------------------------------------------------------------------------------------- */

#ifdef BUG_NO_GENERATION
#define MINE(w, g) (STATE(w) == READY)
#else
#define MINE(w, g) (GENERATION(w) == g && STATE(w) == READY)
#endif

/* Generations never come again; where a seeded bug lets them, the count of frees tells. */
#ifdef BUG_WRAP
#define MINE_INDEED (frees[x] == f)
#define USE(n) f = n
#else
#define USE(n) skip
#define MINE_INDEED (GENERATION(w) == g)
#endif

proctype Client(byte c)
{
    byte  x, g, k;              /* slot, generation, token index + 1 */
    byte  x0, g0, x1, g1;       /* handles: the last registration, the one before */
    short w, took;
#ifdef BUG_WRAP
    byte  f, f0;
#endif

start:
    skip;
    {
    goto begin;
begin:
    if
    :: d_step { ops[c] > 0 && PARALLEL != 1 -> ops[c]-- }; goto find
    :: d_step { ops[c] > 0 && PARALLEL != 0 -> ops[c]-- }; goto take_token
    :: d_step { ops[c] > 0 && g0 > 0 -> ops[c]--; x = x0; g = g0; USE(f0) }; goto terminate
    :: d_step { ops[c] > 0 && g1 > 0 -> ops[c]--; x = x1; g = g1; USE(99) }; goto terminate
    :: d_step { ops[c] > 0 && g0 > 0 -> ops[c]--;                   /* client_status */
                assert(st[x0] / 8 >= g0 || st[x0] / 8 == 0 || !HONEST) }; goto begin    /* P8 */
    :: d_step { ops[c] == 0 -> idle[c] = 1; x0 = 0; g0 = 0; x1 = 0; g1 = 0 }; goto finished
    fi;

take_token:                                             /* client_take_token: load, C1 */
    if
    :: d_step { k == NT -> k = 0 }; goto begin          /* REG_LIMIT */
    :: d_step { k < NT -> w = token_word[k] }
    fi;
    if
    :: d_step { STATE(w) == FREE && token_word[k] == w ->
                took = REQ(GENERATION(w), c, 0, 0, CLAIMED); token_word[k] = took; k++; w = 0 };
       goto find
    :: d_step { STATE(w) != FREE || token_word[k] != w -> k++; w = 0 }; goto take_token
    fi;

find:                                                   /* client_find */
    if
    :: d_step { x == NS -> x = 0 }; goto return_token   /* REG_NO_SLOT */
    :: d_step { x < NS -> w = req[x] }                  /* client_claim: load, C1 */
    fi;
    if
#ifdef BUG_BLIND_CLAIM
    :: d_step { STATE(w) == FREE ->
#else
    :: d_step { STATE(w) == FREE && req[x] == w ->
#endif
                g = GENERATION(w); req[x] = REQ(g, c, k, 0, CLAIMED); w = 0;
                assert((owner[x] == 0 && p_state[x] == ST_NONE) || !HONEST);            /* P1 */
#ifdef BUG_WRAP
                f = frees[x];
#endif
                owner[x] = c }
#ifndef BUG_BLIND_CLAIM
    :: d_step { STATE(w) == FREE && req[x] != w -> x++; w = 0 }; goto find
#endif
    :: d_step { STATE(w) != FREE -> x++; w = 0 }; goto find
    fi;

    d_step { buffer_slot[c] = x + 1; buffer_value[c] = g };     /* client_register: words_store */
    if                                                          /* C3 */
#ifdef BUG_PUBLISH_RELAXED
    :: d_step { req[x] == REQ(g, c, k, 0, CLAIMED) ->
#else
    :: d_step { buffer_slot[c] == 0 && req[x] == REQ(g, c, k, 0, CLAIMED) ->
#endif
                req[x] = REQ(g, c, k, 0, READY);
                owner[x] = 0; published[x] = 1;
                if
                :: k > 0 ->
                    is_parallel[x] = 1; parallel_published++;
                    assert(parallel_published <= NT || !HONEST)                         /* P5 */
                :: else
                fi }
    :: d_step { buffer_slot[c] == 0 && req[x] != REQ(g, c, k, 0, CLAIMED) ->
                assert(!HONEST); x = 0; g = 0 };                                        /* P1 */
       goto return_token
    fi;
    d_step {                                                    /* client_ring */
        dirty[x] = 1;
#if WAITERS
        if
        :: handle_generation == 0 ->
            handle_slot = x; handle_generation = g;
            if :: k > 0 -> handle_token = 1000 * k + took :: else fi
        :: else
        fi;
#endif
#ifdef BUG_WRAP
        f0 = f;
#endif
        x1 = x0; g1 = g0; x0 = x; g0 = g;
        x = 0; g = 0; k = 0; took = 0
    };
    goto begin;

return_token:                                           /* client_return_token: load, CAS */
    if
    :: d_step { k == 0 -> skip }; goto begin
    :: d_step { k > 0 -> w = token_word[k - 1] }
    fi;
    d_step {
        if
        :: STATE(w) == CLAIMED && CID(w) == c && token_word[k - 1] == w ->
            token_word[k - 1] = REQ(GENERATION(w), 0, 0, 0, FREE)
        :: else -> assert(!HONEST)                                                      /* P1 */
        fi;
        w = 0; k = 0; took = 0
    };
    goto begin;

terminate:                                              /* client_terminate: load, C5 */
    w = req[x];
    if
    :: d_step { MINE(w, g) && !TERM(w) && req[x] == w ->
                assert(MINE_INDEED);                                                    /* P3 */
                req[x] = w + 4; asked[x] = 1 }
    :: d_step { MINE(w, g) && !TERM(w) && req[x] != w -> w = 0 }; goto terminate
    :: d_step { !MINE(w, g) || TERM(w) -> w = 0; x = 0; g = 0 }; goto begin
    fi;
    d_step { dirty[x] = 1; w = 0; x = 0; g = 0 };       /* client_ring */
    goto begin;

finished:
end_finished:
    false
    } unless { killed[c] };

    /* SIGKILL: what was stored arrives, then the pidfd is readable. */
    d_step {
        x = 0; g = 0; k = 0; w = 0; took = 0; x0 = 0; g0 = 0; x1 = 0; g1 = 0; idle[c] = 1;
#ifdef BUG_EOF_IS_DEATH
        pidfd[c] = 1
#endif
    };
    d_step { buffer_slot[c] == 0 -> pidfd[c] = 1 };
end_dead:
    d_step { cid_state[c] == CID_FREE && ops[c] > 0 ->          /* supervisor_cid_new */
             cid_state[c] = CID_LIVE; killed[c] = 0; pidfd[c] = 0; idle[c] = 0 };
    goto start
}

/* ------------------------------------------------------------------------------------------
 * The supervisor
 * ---------------------------------------------------------------------------------------- */

/* Connections.notify, notify_final */
#if WAITERS
#define NOTIFY(x) if :: subscribed[x] -> message = 1 :: else fi
#else
#define NOTIFY(x) skip
#endif

/* supervisor_publish, then Connections.notify */
inline publish(x)
{
#ifdef BUG_NOTIFY_FIRST
    d_step { NOTIFY(x) };
    st[x] = ST(p_generation[x], p_state[x])
#else
    st[x] = ST(p_generation[x], p_state[x]);
    d_step { NOTIFY(x) }
#endif
}

inline free_token(x)
{
    if
    :: d_step { p_token[x] > 0 ->
                k = p_token[x] - 1; p_token[x] = 0; t_slot[k] = 0; t_generation[k]++;
                token_word[k] = REQ(t_generation[k], 0, 0, 0, FREE); k = 0 }
    :: d_step { p_token[x] == 0 -> skip }
    fi
}
/* supervisor_free: token, outbox, inbox; then Connections.notify_final */
inline free(x)
{
    d_step {
        owner[x] = 0; published[x] = 0; asked[x] = 0;
        if :: is_parallel[x] -> is_parallel[x] = 0; parallel_published-- :: else fi;
        p_state[x] = ST_NONE; p_cid[x] = 0; p_terminate[x] = 0;
        if
        :: p_generation[x] == GENERATION_MAX ->
#ifdef BUG_WRAP
            p_generation[x] = 1
#else
            p_generation[x] = 0; p_state[x] = ST_RETIRED
#endif
        :: else -> p_generation[x]++
        fi
    };
#ifndef BUG_TOKEN_LAST
    free_token(x);
#endif
#ifndef BUG_INBOX_FIRST
    st[x] = ST(p_generation[x], ST_NONE);
#endif
    d_step {
        if
        :: p_state[x] == ST_RETIRED -> req[x] = REQ(0, 0, 0, 0, READY)
        :: else -> req[x] = REQ(p_generation[x], 0, 0, 0, FREE)
        fi;
#ifdef BUG_WRAP
        frees[x]++
#endif
    };
#ifdef BUG_INBOX_FIRST
    st[x] = ST(p_generation[x], ST_NONE);
#endif
#ifdef BUG_TOKEN_LAST
    free_token(x);
#endif
    d_step { NOTIFY(x); subscribed[x] = 0 }
}

#define NOTHING 0
#define ACCEPT  1
#define DISMISS 2               /* free, without having accepted: reclaim, repair, refuse */
#define REPAIR  3
#define SIGNAL  4

/* What the worker table does with EVENT_TERMINATED: signal a worker, forget what is not started. */
#define STOP_OR_FORGET(x) \
    if :: p_state[x] == ST_RUNNING -> action = SIGNAL :: else -> action = DISMISS fi

#define USED_WORD(x) REQ(p_generation[x], p_cid[x], p_token[x], 0, READY)    /* canonical() */

inline look(x)
{
#ifdef BUG_COPY_FIRST
    r = record[x];
#endif
    d_step {                                            /* supervisor_look: load, decide */
        w = req[x];
        action = NOTHING;
        if
        :: p_state[x] == ST_NONE ->
            if
            :: w == REQ(p_generation[x], 0, 0, 0, FREE)
            :: w != REQ(p_generation[x], 0, 0, 0, FREE) ->
                if
                :: GENERATION(w) == p_generation[x] && CID(w) <= NC &&
                   cid_state[CID(w)] != CID_FREE && STATE(w) == READY ->
                    action = ACCEPT
                :: GENERATION(w) == p_generation[x] && CID(w) <= NC && STATE(w) == CLAIMED &&
                   TERM(w) == 0 && cid_state[CID(w)] == CID_LIVE ->
#ifdef BUG_LIVE_CLAIM
                    action = DISMISS
#endif
                    skip
                :: GENERATION(w) == p_generation[x] && CID(w) <= NC && STATE(w) == CLAIMED &&
                   cid_state[CID(w)] == CID_GONE ->
#ifndef BUG_NO_RECLAIM
                    assert(!published[x] || !HONEST);                                   /* P7 */
                    action = DISMISS
#endif
                    skip
                :: else -> assert(!UNREPAIRED); action = DISMISS
                fi
            fi
        :: else ->
            if
            :: w - 4 * TERM(w) != USED_WORD(x) ->
                assert(!UNREPAIRED);
                action = REPAIR
            :: else
            fi
        fi
    };
    if
    :: d_step { action == REPAIR ->                     /* exchange: S9 */
                w = req[x]; req[x] = USED_WORD(x) + 4 * p_terminate[x];
                if
                :: GENERATION(w) == p_generation[x] && STATE(w) == READY -> action = NOTHING
                :: else -> action = NOTHING; w = 0
                fi }
    :: d_step { action != REPAIR -> skip }
    fi;
    d_step {                                            /* supervisor_look: TERM */
        if
        :: action == NOTHING && p_state[x] != ST_NONE && TERM(w) && !p_terminate[x] ->
            p_terminate[x] = 1; STOP_OR_FORGET(x)
        :: else
        fi
    };
    if
    :: d_step { action == ACCEPT && TOKEN(w) == 0 -> skip }
    :: d_step { action == ACCEPT && TOKEN(w) > 0 ->     /* supervisor_bind */
                k = TOKEN(w) - 1;
                if
                :: k < NT && t_slot[k] == 0 &&
                   token_word[k] == REQ(t_generation[k], CID(w), 0, 0, CLAIMED) ->
#ifndef BUG_NO_BIND
                    t_slot[k] = x + 1; p_token[x] = k + 1
#endif
                    skip
                :: else -> assert(!HONEST); refused = 1                                 /* P5 */
                fi;
                k = 0 }
    :: d_step { action != ACCEPT -> skip }
    fi;
    if
    :: d_step { action == ACCEPT ->                     /* supervisor_accept: record_copy, */
#ifndef BUG_COPY_FIRST
                r = record[x];                          /* record_problem */
#endif
                p_state[x] = ST_ACCEPTED; p_cid[x] = CID(w);
                assert(r == p_generation[x] || !HONEST);                                /* P4 */
                if
                :: refused || r != p_generation[x] || TERM(w) -> action = DISMISS
                :: else
                fi;
                refused = 0; r = 0 }
    :: d_step { action != ACCEPT -> r = 0 }
    fi;
    if
    :: action == ACCEPT ->
#ifdef BUG_ACK_STORE
        req[x] = USED_WORD(x);
#endif
        publish(x)
    :: action == DISMISS -> free(x)
    :: d_step { action == SIGNAL -> skip }              /* p_terminate says so */
    :: d_step { action == NOTHING -> skip }
    fi;
    d_step { action = NOTHING; w = 0 }
}

/* supervisor_sweep_tokens.  Load and exchange are two steps in C; only damage comes between. */
inline sweep_tokens()
{
    d_step {
        do
        :: k < NT ->
            w = token_word[k];
            if
            :: t_slot[k] > 0 &&
               w != REQ(t_generation[k], p_cid[t_slot[k] - 1], 0, 0, CLAIMED) ->
                assert(!UNREPAIRED);
                token_word[k] = REQ(t_generation[k], p_cid[t_slot[k] - 1], 0, 0, CLAIMED)
            :: t_slot[k] == 0 && w != REQ(t_generation[k], 0, 0, 0, FREE) &&
               !(w == REQ(t_generation[k], CID(w), 0, 0, CLAIMED) && CID(w) <= NC &&
                 cid_state[CID(w)] != CID_FREE) ->
                assert(!UNREPAIRED);
                t_generation[k]++; token_word[k] = REQ(t_generation[k], 0, 0, 0, FREE)
            :: else
            fi;
            k++
        :: else -> break
        od;
        k = 0; w = 0
    }
}

/* supervisor_collect_cids, the tokens of one cid.  The process is dead: nobody else changes them. */
inline collect_tokens(c)
{
    d_step {
        do
        :: k < NT ->
            if
            :: t_slot[k] == 0 && token_word[k] == REQ(t_generation[k], c, 0, 0, CLAIMED) ->
                t_generation[k]++; token_word[k] = REQ(t_generation[k], 0, 0, 0, FREE)
            :: else
            fi;
            k++
        :: else -> break
        od;
        k = 0
    }
}

/* One slot in a slice: supervisor_sweep */
#if NC == 1
#define SWEEP_DUE (due[1] > 0)
#elif NC == 2
#define SWEEP_DUE (due[1] > 0 || due[2] > 0)
#else
#define SWEEP_DUE (due[1] > 0 || due[2] > 0 || due[3] > 0)
#endif
#define CAN_START(x) \
    (p_state[x] == ST_ACCEPTED || (p_state[x] == ST_STOPPED && !p_terminate[x]))
#define CAN_EXIT(x) (p_state[x] == ST_RUNNING && (p_terminate[x] || !STUBBORN))

/* Is there damage that the tick of the sweep will find? */
#define DAMAGED(x) \
    ((p_state[x] == ST_NONE && req[x] != REQ(p_generation[x], 0, 0, 0, FREE) && \
      !(GENERATION(req[x]) == p_generation[x] && STATE(req[x]) == CLAIMED && \
        TERM(req[x]) == 0 && CID(req[x]) <= NC && cid_state[CID(req[x])] == CID_LIVE)) || \
     (p_state[x] != ST_NONE && \
      (req[x] - 4 * TERM(req[x]) != USED_WORD(x) || (TERM(req[x]) && !p_terminate[x]))))
#define TOKEN_DAMAGED(k) \
    ((t_slot[k] > 0 && \
      token_word[k] != REQ(t_generation[k], p_cid[t_slot[k] - 1], 0, 0, CLAIMED)) || \
     (t_slot[k] == 0 && token_word[k] != REQ(t_generation[k], 0, 0, 0, FREE) && \
      !(token_word[k] == REQ(t_generation[k], CID(token_word[k]), 0, 0, CLAIMED) && \
        CID(token_word[k]) <= NC && cid_state[CID(token_word[k])] != CID_FREE)))
#if NS == 1
#define ANY_DAMAGED (DAMAGED(0) || TOKEN_DAMAGED(0))
#else
#define ANY_DAMAGED (DAMAGED(0) || DAMAGED(1) || TOKEN_DAMAGED(0))
#endif

proctype Supervisor()
{
    byte  i, k, r, action, position;
    bool  refused;
    short w;

    {
    goto end_asleep;
end_asleep:
    do
    /* supervisor_drain */
    :: if
       :: d_step { dirty[0] -> dirty[0] = 0; i = 0 }
#if NS > 1
       :: d_step { dirty[1] -> dirty[1] = 0; i = 1 }
#endif
       fi;
       look(i); i = 0
    /* supervisor_cid_gone */
#ifdef BUG_NO_ROUND
#define GONE(c) cid_state[c] = CID_FREE
#else
#define GONE(c) cid_state[c] = CID_GONE; due[c] = NS
#endif
    :: if
       :: d_step { pidfd[1] && cid_state[1] == CID_LIVE -> GONE(1); i = 1 }
#if NC > 1
       :: d_step { pidfd[2] && cid_state[2] == CID_LIVE -> GONE(2); i = 2 }
#endif
#if NC > 2
       :: d_step { pidfd[3] && cid_state[3] == CID_LIVE -> GONE(3); i = 3 }
#endif
       fi;
#ifdef BUG_TOKENS_FIRST
       collect_tokens(i);
#endif
#ifdef BUG_CID_EARLY
       d_step { cid_state[i] = CID_FREE };
#endif
       i = 0
    /* supervisor_sweep, a slice of one slot */
    :: d_step { SWEEP_DUE -> i = position; position = (position + 1) % NS };
       look(i); i = 0;
       sweep_tokens();
       d_step {
           i = 1;
           do
           :: i <= NC -> if :: due[i] > 0 -> due[i]-- :: else fi; i++
           :: else -> break
           od;
           i = 1
       };
       do                                               /* supervisor_collect_cids */
       :: d_step { i <= NC && cid_state[i] == CID_GONE && due[i] == 0 -> skip };
#if !defined(BUG_NO_COLLECT) && !defined(BUG_TOKENS_FIRST)
          collect_tokens(i);
#endif
          d_step { cid_state[i] = CID_FREE; i++ }
       :: d_step { i <= NC && !(cid_state[i] == CID_GONE && due[i] == 0) -> i++ }
       :: d_step { i > NC -> i = 0 }; break
       od
    /* launch */
    :: if
       :: d_step { CAN_START(0) -> i = 0; p_state[0] = ST_RUNNING }
#if NS > 1
       :: d_step { CAN_START(1) -> i = 1; p_state[1] = ST_RUNNING }
#endif
       fi;
       publish(i); i = 0
    /* exit: for good, or to be restarted */
    :: if
       :: d_step { CAN_EXIT(0) -> i = 0 }
#if NS > 1
       :: d_step { CAN_EXIT(1) -> i = 1 }
#endif
       fi;
       if
       :: d_step { restarts > 0 && !p_terminate[i] -> restarts--; p_state[i] = ST_STOPPED };
          publish(i)
       :: free(i)
       fi;
       i = 0
#if WAITERS
    /* Connections.subscribe: from now on, and once now */
    :: d_step { subscribing ->
                subscribing = 0; message = 1;
                if
                :: p_generation[handle_slot] == handle_generation -> subscribed[handle_slot] = 1
                :: else
                fi }
#endif
#if CORRUPT > 0
    /* the sweep's tick */
    :: (timeout && ANY_DAMAGED) -> due[1] = due[1] + NS
#endif
    od
    } unless { supervisor_dead }
}

/* ------------------------------------------------------------------------------------------
 * A process that has a handle from another one, and waits
 * ---------------------------------------------------------------------------------------- */

#define OUTBOX_SAYS_GONE (st[handle_slot] / 8 != handle_generation)
#define INBOX_SAYS_GONE  (GENERATION(req[handle_slot]) != handle_generation)

proctype Waiter()
{
    bool satisfied, first;

end_no_handle:
    if
    :: d_step { handle_generation > 0 -> waiting = 1 }
    :: d_step { handle_generation > 0 -> waiting = 2 }
    fi;
    subscribing = 1;
    do
    ::
#ifndef BUG_LOOK_FIRST
        message = 0;                                    /* drain */
#endif
        d_step {                                        /* client_status; look */
            first = OUTBOX_SAYS_GONE;
            satisfied = first ||
                        (waiting == 1 && st[handle_slot] % 8 >= ST_RUNNING);
            if :: waiting == 2 -> satisfied = 0 :: else fi
        };
        if
        :: d_step { waiting == 2 && first ->            /* client_freed: the second load */
#ifdef BUG_WAIT_OUTBOX
                    satisfied = 1;
#else
                    satisfied = INBOX_SAYS_GONE;
#endif
                    if
                    :: satisfied && HONEST ->
                        assert(INBOX_SAYS_GONE);                                        /* P9 */
                        assert(handle_token == 0 ||                                     /* P9 */
                               token_word[handle_token / 1000 - 1] != handle_token % 1000)
                    :: else
                    fi }
        :: d_step { waiting != 2 || !first -> skip }
        fi;
        if :: satisfied -> break :: else -> first = 0 fi;
#ifdef BUG_LOOK_FIRST
        message = 0;
#endif
end_waits:
        if                                              /* poll(connection, pidfd) */
        :: message
        :: supervisor_dead -> break
        fi
    od;
    waiting = 3
}

/* ------------------------------------------------------------------------------------------ */

proctype Killer()
{
#define KILL(c) d_step { crashes > 0 && cid_state[c] == CID_LIVE && !killed[c] && !idle[c] -> \
                         killed[c] = 1; crashes-- }
end_killer:
    do
    :: KILL(1)
#if NC > 1
    :: KILL(2)
#endif
#if NC > 2
    :: KILL(3)
#endif
#if SUPERVISOR_CRASHES > 0
    :: d_step { supervisor_crashes > 0 -> supervisor_crashes--; supervisor_dead = 1 }
#endif
#if CORRUPT > 0
    :: atomic {
           corrupt > 0 -> corrupt--;
           if
           :: req[0] = 0
           :: req[0] = REQ(p_generation[0], 0, 0, 0, FREE)
           :: req[0] = REQ(p_generation[0], 1, 0, 0, CLAIMED)
           :: req[0] = REQ(p_generation[0], 1, 0, 1, CLAIMED)
           :: req[0] = REQ(p_generation[0], 1, 0, 0, READY)
           :: req[0] = REQ(p_generation[0], 1, 1, 0, READY)
           :: req[0] = REQ(p_generation[0], 3, 1, 1, READY)
           :: req[0] = REQ(p_generation[0] + 1, 0, 0, 0, FREE)
           :: req[0] = req[0] - STATE(req[0])
           :: token_word[0] = 0
           :: token_word[0] = REQ(t_generation[0], 0, 0, 0, FREE)
           :: token_word[0] = REQ(t_generation[0], 1, 0, 0, CLAIMED)
           :: token_word[0] = REQ(t_generation[0] + 1, 1, 0, 0, CLAIMED)
           :: record[0] = 0
           :: dirty[0] = 0
           fi }
#endif
    od
}

#define SETTLED(c) (idle[c] && (cid_state[c] != CID_FREE || ops[c] == 0))
#if NC == 1
#define ALL_SETTLED (SETTLED(1))
#elif NC == 2
#define ALL_SETTLED (SETTLED(1) && SETTLED(2))
#else
#define ALL_SETTLED (SETTLED(1) && SETTLED(2) && SETTLED(3))
#endif

init
{
    byte i;

    d_step {
        do
        :: i < NS ->
            p_generation[i] = 1; req[i] = REQ(1, 0, 0, 0, FREE); st[i] = ST(1, ST_NONE); i++
        :: else -> break
        od;
        i = 0;
        do
        :: i < NT -> t_generation[i] = 1; token_word[i] = REQ(1, 0, 0, 0, FREE); i++
        :: else -> break
        od;
        i = 1;
        do :: i <= NC -> cid_state[i] = CID_LIVE; ops[i] = OPS; i++ :: else -> break od;
        i = 0
    };
    atomic {
        run Memory(); run Supervisor(); run Client(1);
#if NC > 1
        run Client(2);
#endif
#if NC > 2
        run Client(3);
#endif
#if WAITERS
        run Waiter();
#endif
        run Killer()
    };

#if CORRUPT > 0
    (timeout && !ANY_DAMAGED);
#else
    (timeout);
#endif
    /* At rest. */
    d_step {
        if
        :: supervisor_dead -> assert(waiting == 0 || waiting == 3)                      /* P6 */
        :: else ->
            assert(ALL_SETTLED || !HONEST);                                             /* P2 */
            do
            :: i < NS ->
                if
                :: p_state[i] == ST_NONE ->
                    assert(req[i] == REQ(p_generation[i], 0, 0, 0, FREE) ||             /* P2, P7 */
                           (!HONEST && STATE(req[i]) == CLAIMED &&
                            cid_state[CID(req[i])] == CID_LIVE));
                    assert(st[i] == ST(p_generation[i], ST_NONE))                       /* P8 */
                :: p_state[i] == ST_RETIRED ->
                    assert(req[i] == REQ(0, 0, 0, 0, READY) && st[i] == ST(0, ST_NONE))
                :: else ->
                    assert(p_state[i] == ST_RUNNING && STUBBORN);                       /* P7 */
                    assert(!asked[i] || !HONEST)                                        /* P7 */
                fi;
                i++
            :: else -> break
            od;
            i = 0;
            do
            :: i < NT ->
                if
                :: t_slot[i] == 0 ->
                    assert(token_word[i] == REQ(t_generation[i], 0, 0, 0, FREE) ||      /* P2 */
                           (!HONEST && STATE(token_word[i]) == CLAIMED &&
                            cid_state[CID(token_word[i])] == CID_LIVE))
                :: else -> assert(p_token[t_slot[i] - 1] == i + 1)
                fi;
                i++
            :: else -> break
            od;
            assert(waiting != 1);                                                       /* P6 */
            assert(waiting != 2 || (STUBBORN && p_state[handle_slot] == ST_RUNNING &&
                                    p_generation[handle_slot] == handle_generation) || !HONEST)
        fi
    }
}
