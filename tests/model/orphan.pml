/*
 * orphan.pml - no worker outlives the supervisor, whenever the supervisor is killed relative to
 *              fork(), prctl(PR_SET_PDEATHSIG) and getppid()
 *
 * The kernel sends the parent-death signal only to children that armed it before the parent died.
 * So a worker arms first and compares its parent then; one killed in between by neither is caught
 * by the other.  The same for processes that a worker forks.
 *   Modelled: _run_child() of _launch.py, _bind_to_parent() of _child.py.
 *
 * Property  A supervisor that is dead leaves no worker: neither one that runs, nor one that sleeps
 *           on its way there.
 *
 * Seeded bugs
 *   BUG_CHECK_FIRST   the parent is compared before the signal is armed
 *   BUG_NO_CHECK      the parent is not compared
 */
bool supervisor_dead, armed, alive;

proctype Worker()
{
    {
#ifdef BUG_CHECK_FIRST
        if :: supervisor_dead -> goto out :: else fi;
        armed = 1;
#else
        armed = 1;                                      /* prctl(PR_SET_PDEATHSIG, SIGKILL) */
#ifndef BUG_NO_CHECK
        if :: supervisor_dead -> goto out :: else fi;   /* getppid() != parent: _exit(1) */
#endif
#endif
end_runs:
        false                                           /* the user's code, for ever */
    } unless { (armed && !alive) };                     /* killed by the kernel */
out:
    alive = 0
}

init
{
    run Worker();
    alive = 1;                                          /* fork() */
    d_step { supervisor_dead = 1; if :: armed -> alive = 0 :: else fi };
    (timeout) -> assert(!alive)
}
