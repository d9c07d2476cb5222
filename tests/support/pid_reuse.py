"""A supervisor, its workers and strangers in a pid namespace that has hardly any pids.

Run as the first process of that namespace.  Workers and strangers come and go, so that the numbers
are used again all the time, while everything that can be asked through a handle is asked through
handles of workers that are long gone.  A stranger has all signals blocked, leads a process group
of its own, and tells at its end which signals have come; one that cannot be blocked shows in its
exit status.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import NoReturn

from pgbgw import HandleStatus, Supervisor, WorkerHandle

PID_MAX = Path("/proc/sys/kernel/pid_max")
FIRST_AGAIN = 300  # the kernel begins each round but the first here
PIDS = 20  # of each round
STRANGERS = 6
HANDLES = 300
SIGNALLED = 77  # exit status of a stranger that was sent a signal


def main(seed: int, rounds: int) -> None:
    PID_MAX.write_text(str(FIRST_AGAIN + PIDS))
    print(json.dumps(Town(seed).live(rounds)))
    sys.stdout.flush()


class Town:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.strangers: deque[tuple[int, float]] = deque()
        self.last_pid = self.rounds = self.met = self.asked = self.refused = 0
        self.signalled: list[str] = []
        self.shared = 0  # strangers that had the number of a worker before
        self.worker_pids: set[int] = set()

    def live(self, rounds: int) -> dict[str, object]:
        old: deque[WorkerHandle] = deque(maxlen=HANDLES)
        workers: list[WorkerHandle] = []
        wrong: list[str] = []
        with Supervisor(max_worker_processes=6).start() as client:
            while self.rounds < rounds and not self.signalled:
                self.meet_strangers()
                # Some workers, which end by themselves, when asked, or when killed after a grace.
                while len(workers) < 4:
                    entry = self.random.choice(("noop", "sleep_until_stopped", "ignore_sigterm"))
                    handle = client.try_register(f"support.workers:{entry}")
                    if handle is None:
                        break
                    workers.append(handle)
                for handle in workers:
                    if pid := handle.pid:
                        self.worker_pids.add(pid)
                    if self.random.random() < 0.5:
                        handle.terminate(grace=self.random.choice((0.0, 0.01, 0.02)))
                gone = [h for h in workers if h.outcome is not None and h.outcome.final]
                workers = [h for h in workers if h not in gone]
                old.extend(gone)
                for handle in self.random.sample(list(old), min(len(old), 12)):
                    self.ask(handle)
                    if handle.status() is not HandleStatus.STOPPED or handle.pid is not None:
                        wrong.append(f"{handle!r} is {handle.status()}, pid {handle.pid}")
            client.stop("immediate", timeout=60)  # some are deaf to anything less
        self.end_strangers()
        return {
            "rounds": self.rounds,
            "met": self.met,
            "asked": self.asked,
            "shared": self.shared,
            "refused": self.refused,
            "violations": self.signalled + wrong,
        }

    def ask(self, handle: WorkerHandle) -> None:
        self.asked += 1
        what = self.random.randrange(4)
        if what == 0:
            handle.terminate()
        elif what == 1:
            handle.terminate(grace=0.0)
        elif what == 2:
            handle.cancel()
        else:
            handle.wake()

    # --- strangers ------------------------------------------------------------------------------

    def meet_strangers(self) -> None:
        now = time.monotonic()
        while self.strangers and self.strangers[0][1] <= now:
            self.part_from(self.strangers.popleft()[0])
        while len(self.strangers) < STRANGERS:
            stay = self.random.random() * 0.01
            try:
                pid = os.fork()
            except BlockingIOError:  # all numbers are taken at the moment
                self.refused += 1
                return
            if pid == 0:
                be_a_stranger(stay)
            self.met += 1
            self.rounds += pid < self.last_pid
            self.last_pid = pid
            self.shared += pid in self.worker_pids
            self.worker_pids.discard(pid)
            self.strangers.append((pid, now + stay))

    def part_from(self, pid: int) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status:
            self.signalled.append(f"stranger {pid} ended with {status}")

    def end_strangers(self) -> None:
        while self.strangers:
            self.part_from(self.strangers.popleft()[0])


def be_a_stranger(stay: float) -> NoReturn:
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        os.setpgid(0, 0)
        time.sleep(stay)
        status = SIGNALLED if signal.sigpending() else 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
