"""Bugs to seed into the package's Python, each a replaced text, and the test that must find it.

What core_bugs is for the headers.  Where two steps are only the wrong way round, the new text holds
the window between them open: the tests that must find it try a few times, not a million.
tests/meta/test_core_bugs.py keeps the table true to the sources.
"""

from __future__ import annotations

from typing import NamedTuple


class PackageBug(NamedTuple):
    file: str
    old: str
    new: str
    found_by: str  # a test, below tests/
    says: str  # what its failure says

    def seed(self, text: str) -> str:
        assert text.count(self.old) == 1, f"{self.old!r} is there {text.count(self.old)} times"
        return text.replace(self.old, self.new)


T05 = (
    "fault/test_t05_supervisor_killed.py"
    "::test_T05_a_killed_supervisor_leaves_no_orphan_and_nobody_waiting"
)
REAPING = (
    "unit/test_launch.py::test_stragglers_are_signalled_after_the_death_and_before_the_reaping"
)
E02 = (
    "conformance/test_e_waiting.py"
    "::test_E02_with_room_for_one_waiting_for_the_end_makes_room_for_the_next"
)
D05 = "conformance/test_d_handle.py::test_D05_started_promises_a_process_and_ready_that_it_said_so"
I03 = (
    "conformance/test_i_robustness.py"
    "::test_I03_a_client_stopped_in_mid_registration_holds_up_nobody"
)

_SIGNAL = "        _kernel.set_parent_death_signal(signal.SIGKILL)\n"
_CHECK = "        if os.getppid() != surroundings.supervisor:\n            os._exit(1)\n"
_FREE = (
    "        self._view.set_outcome(slot, kind, exitcode, signum, restarts, True, now, error)\n"
    "        self._view.free(slot)\n"
)
_FINAL = "(kind, exitcode, signum, restarts, now)"
_TELL_END = f"        self.connections.notify_final(slot, generation, {_FINAL})\n"
_READY = "                self._view.set_ready(worker.slot)\n"
_TELL_READY = "                self.connections.notify(worker.slot, worker.generation)\n"
_OPEN = "        time.sleep(0.05)\n"

PACKAGE_BUGS = {
    # --- the order of a new process ---------------------------------------------------------
    "no-parent-death-signal": PackageBug("_launch.py", _SIGNAL, "", T05, "outlive"),
    "parent-looked-at-before-the-signal-is-armed": PackageBug(
        "_launch.py", _SIGNAL + _CHECK, _CHECK + _OPEN + _SIGNAL, T05, "orphans: ["
    ),
    # --- the order of an end ----------------------------------------------------------------
    "group-signalled-after-the-reaping": PackageBug(
        "_launch.py",
        "            if leftovers:\n"
        "                self.signal_group(leftovers)\n"
        "            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)\n",
        "            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)\n"
        "            if leftovers:\n"
        "                self.signal_group(leftovers)\n",
        REAPING,
        "NoSuchProcess",
    ),
    # --- status before notification ---------------------------------------------------------
    "readiness-told-before-it-is-stored": PackageBug(
        "_workers.py",
        _READY + _TELL_READY,
        _TELL_READY + "        " + _OPEN + _READY,
        D05,
        "did not get ready in time",
    ),
    "end-told-before-the-slot-is-free": PackageBug(
        "_workers.py", _FREE + _TELL_END, _TELL_END + _OPEN + _FREE, E02, "did not stop in time"
    ),
    # --- the death of clients ---------------------------------------------------------------
    "dead-clients-keep-what-they-had": PackageBug(
        "_connections.py",
        "        os.close(process.pidfd)\n        self._view.client_gone(process.cid)\n",
        "        os.close(process.pidfd)\n",
        I03,
        "not true within",
    ),
}
