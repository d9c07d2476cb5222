"""Clients in processes of their own, which do what the test tells them.

with ClientProcess(client.address) as other:
    handle = other.call("register", "support.workers:noop")
    assert other.call_handle(handle, "wait_until_gone", 10).exitcode == 0

What a call raises there is raised here.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from pgbgw import WorkerHandle
from support.processes import Script

_OBEY = """
from pgbgw import attach

client = None
while (order := test.recv()) is not None:
    what, *rest = order
    try:
        if what == "attach":
            client = attach(rest[0])
            answer = None
        elif what == "client":
            method, arguments, keywords = rest
            answer = getattr(client, method)(*arguments, **keywords)
        else:
            handle, method, arguments = rest
            answer = getattr(handle, method)(*arguments)
    except Exception as exc:
        test.send((True, exc))
    else:
        test.send((False, answer))
if client is not None:
    client.close()
"""


class ClientProcess(Script):
    """A process that is attached to the supervisor at `address`, or will be when told to."""

    def __init__(self, address: str, *, attached: bool = True) -> None:
        super().__init__(_OBEY)
        self._address = address
        if attached:
            self.attach()

    def attach(self) -> None:
        self._ask("attach", self._address)

    def call(self, method: str, *args: object, **keywords: object) -> Any:
        """Call a method of its Client."""
        return self._ask("client", method, args, keywords)

    def call_handle(self, handle: WorkerHandle, method: str, *args: object) -> Any:
        """Call a method of its own copy of the handle."""
        return self._ask("handle", handle, method, args)

    def begin(self, method: str, *args: object) -> None:
        """Call a method of its Client, but do not wait: finish() gives the answer."""
        self.say(("client", method, args, {}))

    def finish(self) -> Any:
        failed, answer = self.hear()
        if failed:
            raise answer
        return answer

    def _ask(self, *order: object) -> Any:
        self.say(order)
        return self.finish()

    def end(self) -> None:
        """Let it close its client and exit."""
        self.say(None)
        assert self.wait() == 0

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None and self.process.poll() is None:
            self.say(None)
        super().__exit__(exc_type, exc, traceback)
