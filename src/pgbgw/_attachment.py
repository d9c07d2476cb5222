"""Connecting to a supervisor: the handshake, for a process's first connection and for others."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from dataclasses import dataclass

from pgbgw import _runtime, _wire
from pgbgw._runtime import Address
from pgbgw._wire import Message, pack, receive, unpack
from pgbgw.errors import AttachError

RETRY = 0.01  # seconds between attempts while the supervisor starts, or is full


@dataclass(slots=True)
class Attachment:
    """A connection and what the supervisor sent along: cid, allow list, descriptors."""

    sock: socket.socket
    cid: int
    allow: list[str] | None
    outbox: int
    inbox: int
    supervisor: int  # pidfd
    identity: tuple[int, int]  # of the outbox: no other supervisor's has it while it is mapped

    def close_segments(self) -> None:
        """The descriptors of the segments: once mapped they are not needed."""
        os.close(self.outbox)
        os.close(self.inbox)


def connect(address: Address, deadline: float, *, first: bool) -> Attachment:
    """Attach, trying again while a supervisor starts or is full.  AttachError otherwise.

    deadline: in monotonic time.  first: become a new client, else another connection of this one.
    """
    dirfd = _runtime.open_directory(address, create=False)
    try:
        while True:
            try:
                sock = _runtime.connect(address, dirfd)
            except (FileNotFoundError, ConnectionRefusedError) as exc:
                # The lock tells a supervisor that starts from one that is not there.
                if _runtime.supervisor_locked(address, dirfd) is None:
                    raise AttachError(
                        f'no supervisor is running at "{address}"',
                        detail=exc.strerror,
                        hint="start one with `pgbgw run`, or check the address",
                    ) from exc
                problem = "a supervisor is starting or stopping there"
            except BlockingIOError:
                problem = "too many processes are attaching"
            else:
                attachment = _shake_hands(sock, address, deadline, first)
                if attachment is not None:
                    return attachment
                problem = "the supervisor hung up"
            if time.monotonic() + RETRY >= deadline:
                raise AttachError(
                    f'could not attach to the supervisor at "{address}" in time',
                    detail=problem,
                    hint="raise the timeout, or see the supervisor's log",
                )
            time.sleep(RETRY)
    finally:
        os.close(dirfd)


def _shake_hands(
    sock: socket.socket, address: Address, deadline: float, first: bool
) -> Attachment | None:
    """Say who we are, be welcomed; None if the supervisor hangs up first."""
    try:
        challenge = _answer(sock, address, deadline)
        message = unpack(challenge[0]) if challenge is not None else None
        if challenge is not None and message is not None and message[0] == Message.REFUSED:
            return welcome(sock, *challenge, address)
        if message is None or message[0] != Message.CHALLENGE:
            sock.close()
            return None
        body = _wire.HELLO.pack(_wire.PROTOCOL, first)
        hello = pack(Message.HELLO, os.getpid(), message[2], body)
        try:
            sock.send(hello, socket.MSG_NOSIGNAL)
        except OSError:
            sock.close()
            return None
        answer = _answer(sock, address, deadline)
        if answer is None:
            sock.close()
            return None
        return welcome(sock, *answer, address)
    except BaseException:
        sock.close()
        raise


def _answer(
    sock: socket.socket, address: Address, deadline: float
) -> tuple[bytes, list[int]] | None:
    while True:
        left = deadline - time.monotonic()
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        if not poll.poll(max(0.0, min(left, 3600.0)) * 1000):
            if left > 0.0:
                continue
            raise AttachError(
                f'the supervisor at "{address}" did not answer in time',
                hint="raise the timeout; a supervisor that was stopped (SIGSTOP) cannot answer",
            )
        try:
            data, fds = receive(sock)
        except BlockingIOError:
            continue
        except OSError:
            return None
        return (data, fds) if data else None


def welcome(sock: socket.socket, data: bytes, fds: list[int], address: Address) -> Attachment:
    """What a WELCOME brings; AttachError for a REFUSED.  The socket becomes the attachment's."""
    message = unpack(data)
    if message is None or message[0] != Message.WELCOME or len(fds) != 3:
        for fd in fds:
            os.close(fd)
        reason = "unexpected answer"
        if message is not None and message[0] == Message.REFUSED:
            reason = message[3].decode("utf-8", "replace")
        raise AttachError(f'the supervisor at "{address}" refused', detail=reason)
    body = message[3]
    cid, has_allow = _wire.WELCOME.unpack_from(body)
    allow = json.loads(body[_wire.WELCOME.size :]) if has_allow else None
    outbox, inbox, supervisor = fds
    status = os.fstat(outbox)
    identity = (status.st_dev, status.st_ino)
    return Attachment(sock, cid, allow, outbox, inbox, supervisor, identity)
