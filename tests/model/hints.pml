/*
 * hints.pml - the slot protocol: dirty bits and the sleep word, free hints, the free count,
 *             slices of the sweep, cids
 *
 * A model of _slots_client.h and _slots_supervisor.h, beside slots.pml: there words are exact and
 * the supervisor hears of every change, here it must hear.  One step has at most one access to
 * shared memory; SIGKILL hits between any two.  All slots have their bits in one word.  The tick
 * of the sweep is left out: without damage everything must work without it.
 *
 *   Client       client_find as it is built (hints from a random start, then the free count, then
 *                all words, then free_seq), client_claim, client_claim_hinted, the publish of
 *                client_register, client_ring, client_terminate; SIGKILL, DETACH.  With THREADS
 *                all clients are threads of one process.
 *   Supervisor   the loop of ServerLoop.run: supervisor_prepare_sleep, wait, supervisor_awake,
 *                supervisor_drain (one look a pass: the bound), supervisor_sweep (a slice of one
 *                slot), supervisor_look, _accept, _free, _cid_gone, _collect_cids, _cid_new.
 *
 * Properties
 *   H1  At rest every published registration was looked at and every TERM carried out; nothing
 *       stays claimed (I8, I11).
 *   H2  At rest every free slot has its hint (I9).
 *   H3  A refusal is exact: at some instant of the call no slot was free (I10).
 *   H4  A live client's claim is not taken away; no slot has two owners.
 *   H5  At rest the free count is that of the supervisor's private view (I10).
 *   Besides: no deadlock but at rest; no endless execution (run with -DNP).
 *
 * Seeded bugs, each with the property that must catch it
 *   BUG_SLEEP_EARLY     client_ring loads the sleep word before it sets the dirty bit      H1
 *   BUG_CHECK_FIRST     supervisor_prepare_sleep scans dirty, then raises the sleep word   H1
 *   BUG_RELAXED_SLEEP   its store is relaxed: it may arrive later                          H1
 *   BUG_RING_FLAG       "has rung" is remembered without the sleep word's value            H1
 *   BUG_FORGET_PENDING  the supervisor sleeps on bits taken and not looked at              H1
 *   BUG_CLEAR_AFTER     supervisor_drain clears a dirty bit after it has looked            H1
 *   BUG_HALF_ROUND      a death noticed in mid-round is content with the round's rest      H1
 *   BUG_CLEAR_LATE      a client clears the hint after it has published and rung           H2
 *   BUG_NO_RECHECK      client_claim_hinted does not load the word again                   H2
 *   BUG_SWEEP_NO_HINT   supervisor_look sets no hint on a free slot                        H2
 *   BUG_HINT_FIRST      supervisor_free sets the hint before the word                      H2
 *   BUG_NO_FREE_SEQ     client_find does not compare free_seq                              H3
 *   BUG_COUNT_LATE      supervisor_free raises the count outside the bracket of free_seq   H3
 *   BUG_DETACH_EARLY    DETACH is sent while an operation is in flight                     H4
 *   BUG_COUNT_CLAIMED   freeing a claim raises the count, which never went down            H5
 *
 * Not modelled: what slots.pml models (tokens, records, the outbox's words, waiters, damage).
 */
#ifndef NS
#define NS 2                    /* slots */
#endif
#ifndef NC
#define NC 2                    /* clients */
#endif
#ifndef OPS
#define OPS 1                   /* registrations of each client, over all its processes */
#endif
#ifndef FIRST_OPS
#define FIRST_OPS OPS           /* of the first one */
#endif
#ifndef CRASHES
#define CRASHES 1
#endif
#ifndef DETACHES
#define DETACHES 0
#endif
#ifndef TERMINATES
#define TERMINATES 1            /* clients may terminate what they registered */
#endif

/* req_word() without the token; clients are counted from 0 here. */
#define FREE    1
#define CLAIMED 2
#define READY   3
#define REQ(g, c, t, s) ((g) * 32 + (c) * 8 + (t) * 4 + (s))
#define GENERATION(w) ((w) / 32)
#define CID(w)   (((w) / 8) % 4)
#define TERM(w)  (((w) / 4) % 2)
#define STATE(w) ((w) % 4)

#define ALL (1 << NS) - 1
#define LOWEST(bits) ((bits) & 1 -> 0 : ((bits) & 2 -> 1 : 2))

#define CID_FREE 0
#define CID_LIVE 1
#define CID_GONE 2

#ifdef THREADS
#define cid 0
#else
#define cid c
#endif

/* The inbox. */
byte req[NS];
byte dirty, hints = ALL;
/* The outbox.  The sleep word is a counter; here only whether it is odd. */
bit  asleep;
byte free_seq, nfree = NS;
/* The kernel's: the doorbell (a full socket holds one already), signals, pidfds. */
bool doorbell, killed[NC], pidfd[NC], detached[NC], idle[NC];
/* client_t.rung: is it the sleep word's present value?  known: is what this client loaded? */
bool rung[NC], known[NC];

/* The supervisor's private memory. */
byte p_generation[NS];
bool p_used[NS], p_terminate[NS];
bool stubborn[NS];              /* the worker ends on a signal only */
byte cid_state[NC] = CID_LIVE, due[NC];
bool resting;

byte ops[NC] = OPS, crashes = CRASHES, detaches = DETACHES;

/* What only the properties know: was there an instant of the call with no slot free? */
bool saw_none[NC];
#if NS == 1
#define NONE_FREE (STATE(req[0]) != FREE)
#elif NS == 2
#define NONE_FREE (STATE(req[0]) != FREE && STATE(req[1]) != FREE)
#else
#define NONE_FREE (STATE(req[0]) != FREE && STATE(req[1]) != FREE && STATE(req[2]) != FREE)
#endif

#ifdef BUG_RING_FLAG
#define FORGET_RUNG
#else
#define FORGET_RUNG rung[0] = 0; rung[NC - 1] = 0;
#endif
#if NC > 2
#define SLEEP_WORD(v) asleep = v; known[0] = 0; known[1] = 0; known[2] = 0; rung[1] = 0; FORGET_RUNG
#else
#define SLEEP_WORD(v) asleep = v; known[0] = 0; known[NC - 1] = 0; FORGET_RUNG
#endif

/* ------------------------------------------------------------------------------------------
 * Clients
 * ---------------------------------------------------------------------------------------- */

inline load_sleep()
{
    d_step { ring_it = asleep && !rung[cid]; known[c] = 1 }
}

inline ring(x)                                          /* client_ring */
{
#ifdef BUG_SLEEP_EARLY
    load_sleep();
#endif
    dirty = dirty | (1 << x);
#ifndef BUG_SLEEP_EARLY
    load_sleep();
#endif
    if
    :: d_step { ring_it -> doorbell = 1 };              /* send */
       d_step { rung[cid] = known[c]; known[c] = 0; ring_it = 0 }
    :: d_step { !ring_it -> known[c] = 0 }
    fi
}

proctype Client(byte c)
{
    byte x, g, w, bits, from, seq, phase;
    bool got, ring_it;

start:
    skip;
    {
    goto begin;
begin:
    if
    :: ops[c] == 0 -> goto finished
#if DETACHES > 0
    :: d_step { ops[c] > 0 && detaches > 0 && !detached[cid] -> detaches--; detached[cid] = 1 };
       goto left
#endif
#define BEGIN ops[c]--; seq = free_seq; saw_none[c] = NONE_FREE; phase = 0
    /* client_find: free_seq, the start, the start word's upper part */
    :: d_step { ops[c] > 0 -> BEGIN; from = 0 };
       bits = hints
#if NS > 1
    :: d_step { ops[c] > 0 -> BEGIN; from = NS - 1 };
       bits = hints & ~((1 << from) - 1)
#endif
    fi;

next:
    if
    :: d_step { bits != 0 && phase < 2 -> x = LOWEST(bits); bits = bits & (bits - 1) };
       goto claim
    :: d_step { bits == 0 && phase == 0 && from > 0 -> phase = 1;       /* its lower part */
                bits = hints & ((1 << from) - 1) };
       goto next
    :: d_step { bits == 0 && phase < 2 && (phase == 1 || from == 0) ->  /* the free count */
                phase = 2; from = 0; x = (nfree != 0 -> 0 : NS) };
       goto next
    :: d_step { phase == 2 && x < NS && STATE(req[x]) != FREE -> x++ }; /* all words */
       goto next
    :: d_step { phase == 2 && x < NS && STATE(req[x]) == FREE -> skip };
       goto claim
    :: d_step { phase == 2 && x == NS ->                                /* free_seq again */
#ifndef BUG_NO_FREE_SEQ
                if
                :: seq % 2 == 0 && seq == free_seq -> assert(saw_none[c])               /* H3 */
                :: else
                fi;
#else
                assert(saw_none[c]);                                                    /* H3 */
#endif
                saw_none[c] = 0; seq = 0; x = 0; phase = 0 };
       goto begin
    fi;

claim:                                                  /* client_claim_hinted, client_claim: */
    w = req[x];                                         /* load */
    if                                                  /* C1 */
    :: d_step { STATE(w) == FREE && req[x] == w ->
                assert(!p_used[x]);                                                     /* H4 */
                g = GENERATION(w); req[x] = REQ(g, cid, 0, CLAIMED); got = 1;
                bits = 0; seq = 0; from = 0; phase = 0; saw_none[c] = 0;
                if
                :: NONE_FREE ->
                    saw_none[0] = 1; saw_none[NC - 1] = 1;
#if NC > 2
                    saw_none[1] = 1;
#endif
                    saw_none[c] = 0
                :: else
                fi }
    :: d_step { STATE(w) != FREE || req[x] != w -> skip }
    fi;
    w = 0;
#ifdef BUG_CLEAR_LATE
    if :: !got -> hints = hints & ~(1 << x) :: else fi;
#else
    hints = hints & ~(1 << x);
#endif
#if defined(BUG_DETACH_EARLY) && DETACHES > 0
    if
    :: d_step { detaches > 0 && !detached[cid] -> detaches--; detached[cid] = 1 }
    :: skip
    fi;
#endif
    if
    :: d_step { !got && (
#ifdef BUG_NO_RECHECK
                true ||
#endif
                STATE(req[x]) != FREE) -> x = (phase == 2 -> x + 1 : 0) };
       goto next
#ifndef BUG_NO_RECHECK
    :: d_step { !got && STATE(req[x]) == FREE -> skip };
       hints = hints | (1 << x);
       x = (phase == 2 -> x + 1 : 0);
       goto next
#endif
    :: d_step { got -> got = 0;                         /* client_register: C3 */
                assert(req[x] == REQ(g, cid, 0, CLAIMED));                              /* H4 */
                req[x] = REQ(g, cid, 0, READY) }
    fi;
    ring(x);
#ifdef BUG_CLEAR_LATE
    hints = hints & ~(1 << x);
#endif

    if
#if TERMINATES
    :: true ->
again:  w = req[x];                                     /* client_terminate: load, C5 */
        if
        :: d_step { w == REQ(g, cid, 0, READY) && req[x] == w -> req[x] = w + 4; w = 0 };
           ring(x)
        :: d_step { w == REQ(g, cid, 0, READY) && req[x] != w -> w = 0 };
           goto again
        :: d_step { w != REQ(g, cid, 0, READY) -> w = 0 }
        fi
#endif
    :: true
    fi;
    x = 0; g = 0;
    goto begin;

left:
    killed[cid] = 1;                                    /* as good as dead, by its own hand */
finished:
    idle[c] = 1;
end_finished:
    false
    } unless { killed[cid] };

    /* SIGKILL or DETACH.  A process is dead when all its threads are. */
    d_step {
        x = 0; g = 0; w = 0; bits = 0; from = 0; seq = 0; phase = 0; got = 0; ring_it = 0;
        saw_none[c] = 0; known[c] = 0; idle[c] = 1; pidfd[c] = 1
    };
end_dead:
    d_step { cid_state[cid] == CID_FREE && ops[c] > 0 ->        /* supervisor_cid_new */
             cid_state[cid] = CID_LIVE; rung[cid] = 0;
             killed[cid] = 0; pidfd[cid] = 0; detached[cid] = 0; idle[c] = 0 };
    goto start
}

/* ------------------------------------------------------------------------------------------
 * The supervisor
 * ---------------------------------------------------------------------------------------- */

inline free(x)                                          /* supervisor_free */
{
    d_step {
        free_seq++;
#ifdef BUG_COUNT_CLAIMED
        k = 1;
#else
        k = p_used[x];
#endif
        p_generation[x]++; p_used[x] = 0; p_terminate[x] = 0; stubborn[x] = 0
    };
#ifdef BUG_HINT_FIRST
    hints = hints | (1 << x);
#endif
#ifndef BUG_COUNT_LATE
    nfree = nfree + k;
#endif
    req[x] = REQ(p_generation[x], 0, 0, FREE);
    free_seq++;
#ifdef BUG_COUNT_LATE
    nfree = nfree + k;
#endif
    k = 0;
#ifndef BUG_HINT_FIRST
    hints = hints | (1 << x)
#endif
}

inline look(x)                                          /* supervisor_look */
{
    w = req[x];
    if
    :: d_step { !p_used[x] && STATE(w) == FREE -> w = hints & (1 << x) };
       if
#ifndef BUG_SWEEP_NO_HINT
       :: w == 0 -> hints = hints | (1 << x)
#endif
       :: d_step { w != 0 -> w = 0 }
#ifdef BUG_SWEEP_NO_HINT
       :: w == 0
#endif
       fi
    :: d_step { !p_used[x] && STATE(w) == READY ->      /* supervisor_accept */
                p_used[x] = 1; nfree-- };
       if
       :: d_step { TERM(w) -> w = 0 }; free(x)
       :: d_step { !TERM(w) -> stubborn[x] = 1; w = 0 }
       :: d_step { !TERM(w) -> stubborn[x] = 0; w = 0 }
       fi
    :: d_step { !p_used[x] && STATE(w) == CLAIMED && cid_state[CID(w)] != CID_GONE -> w = 0 }
    :: d_step { !p_used[x] && STATE(w) == CLAIMED && cid_state[CID(w)] == CID_GONE -> w = 0 };
       free(x)
    :: d_step { p_used[x] -> if :: TERM(w) -> p_terminate[x] = 1 :: else fi; w = 0 }
    fi
}

#if NC == 1 || defined(THREADS)
#define SWEEP_DUE (due[0] > 0)
#elif NC == 2
#define SWEEP_DUE (due[0] > 0 || due[1] > 0)
#else
#define SWEEP_DUE (due[0] > 0 || due[1] > 0 || due[2] > 0)
#endif

#if defined(THREADS) && NC == 2
#define LEFT(k) (cid_state[0] == CID_LIVE && (pidfd[0] && pidfd[1]))
#else
#define LEFT(k) (cid_state[k] == CID_LIVE && (pidfd[k] || detached[k]))
#endif
#define CAN_EXIT(x) (p_used[x] && (p_terminate[x] || !stubborn[x]))

#if NC == 1 || defined(THREADS)
#define ANY_LEFT LEFT(0)
#elif NC == 2
#define ANY_LEFT (LEFT(0) || LEFT(1))
#else
#define ANY_LEFT (LEFT(0) || LEFT(1) || LEFT(2))
#endif
#if NS == 1
#define ANY_EXIT CAN_EXIT(0)
#elif NS == 2
#define ANY_EXIT (CAN_EXIT(0) || CAN_EXIT(1))
#else
#define ANY_EXIT (CAN_EXIT(0) || CAN_EXIT(1) || CAN_EXIT(2))
#endif

#ifdef BUG_RELAXED_SLEEP
bool under_way;
active proctype StoreBuffer()
{
end_arrive:
    do :: d_step { under_way -> under_way = 0; SLEEP_WORD(1) } od
}
#endif

proctype Supervisor()
{
    byte w, i, k, pending, position;

    do
    ::
    /* ServerLoop.run: supervisor_prepare_sleep, wait */
#ifdef BUG_FORGET_PENDING
    if
    :: !SWEEP_DUE ->
#else
    if
    :: !SWEEP_DUE && pending == 0 ->
#endif
#ifdef BUG_CHECK_FIRST
       w = dirty;
       d_step { SLEEP_WORD(1) };
#else
#ifdef BUG_RELAXED_SLEEP
       under_way = 1;
#else
       d_step { SLEEP_WORD(1) };
#endif
       w = dirty;
#endif
       if
       :: d_step { w == 0 -> resting = 1 };
end_asleep:
          doorbell || ANY_LEFT || ANY_EXIT;
          resting = 0
       :: w != 0 -> w = 0
       fi
    :: else
    fi;

    /* what wait() calls: messages, pidfds */
    d_step {
        doorbell = 0;
        k = 0;
        do
        :: k < NC ->
            if
            :: LEFT(k) ->
                cid_state[k] = CID_GONE;                /* supervisor_cid_gone */
#ifdef BUG_HALF_ROUND
                due[k] = NS - position
#else
                due[k] = NS
#endif
            :: else
            fi;
            k++
        :: else -> break
        od;
        k = 0
    };
    if
    :: CAN_EXIT(0) -> free(0)
#if NS > 1
    :: CAN_EXIT(1) -> free(1)
#endif
#if NS > 2
    :: CAN_EXIT(2) -> free(2)
#endif
    :: true ->
progress_runs_on:                                       /* a worker may, for ever */
       skip
    fi;

    /* supervisor_awake */
    d_step {
#ifdef BUG_RELAXED_SLEEP
        under_way = 0;
#endif
        if :: asleep -> SLEEP_WORD(0) :: else fi
    };

    /* supervisor_drain, at most one look */
#ifdef BUG_CLEAR_AFTER
    pending = dirty;
#else
    d_step { pending = pending | dirty; dirty = 0 };
#endif
    if
    :: d_step { pending != 0 -> i = LOWEST(pending); pending = pending & (pending - 1) };
       look(i);
#ifdef BUG_CLEAR_AFTER
       dirty = dirty & ~(1 << i);
#endif
       i = 0
    :: d_step { pending == 0 -> skip }
    fi;

    /* supervisor_sweep, a slice of one slot; supervisor_collect_cids */
    if
    :: SWEEP_DUE ->
       look(position);
       d_step {
           position = (position + 1) % NS;
           k = 0;
           do
           :: k < NC ->
               if
               :: due[k] > 0 ->
                   due[k]--;
                   if :: due[k] == 0 -> cid_state[k] = CID_FREE :: else fi
               :: else
               fi;
               k++
           :: else -> break
           od;
           k = 0
       }
    :: else
    fi
    od
}

#define KILL(k) d_step { crashes > 0 && cid_state[k] == CID_LIVE && !killed[k] && !idle[k] -> \
                         killed[k] = 1; crashes-- }
proctype Killer()
{
end_killer:
    do
    :: KILL(0)
#if NC > 1 && !defined(THREADS)
    :: KILL(1)
#endif
#if NC > 2 && !defined(THREADS)
    :: KILL(2)
#endif
    od
}

init
{
    byte i;

    d_step {
        ops[0] = FIRST_OPS;
        do
        :: i < NS -> p_generation[i] = 1; req[i] = REQ(1, 0, 0, FREE); i++
        :: else -> break
        od;
        i = 0
    };
    atomic {
        run Supervisor(); run Killer(); run Client(0);
#if NC > 1
        run Client(1);
#endif
#if NC > 2
        run Client(2)
#endif
    };

    (timeout);
    /* At rest. */
    d_step {
        assert(resting);
        do
        :: i < NS ->
            assert(STATE(req[i]) != READY || p_used[i]);                                /* H1 */
            assert(!TERM(req[i]));                                                      /* H1 */
            assert(STATE(req[i]) != CLAIMED);                                           /* H1 */
            assert(STATE(req[i]) != FREE || (hints & (1 << i)));                        /* H2 */
            if :: !p_used[i] -> nfree-- :: else fi;
            i++
        :: else -> break
        od;
        assert(nfree == 0)                                                              /* H5 */
    }
}
