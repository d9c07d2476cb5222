"""The messages on a connection, where clients and workers meet the supervisor beside shared memory.

Every message is one SEQPACKET datagram: a head (type, slot, generation) and, with some, a body.
Doorbells (KICK) are sent by the C core.  Nothing on this path decides by a pid, and no descriptor
travels towards the supervisor.
"""

from __future__ import annotations

import socket
import struct
from array import array
from collections.abc import Iterable
from enum import IntEnum
from fnmatch import fnmatchcase

PROTOCOL = 1
HEAD = struct.Struct("<IIQ")
MAX_MESSAGE = 1024  # bytes a client or a worker may send at once; what is longer is cut off
MAX_READS = 64  # messages read from one connection in one pass of the loop

HELLO = struct.Struct("<II")  # protocol, 1 if this is to be the process's first connection
GRACE = struct.Struct("<q")  # TERMINATE: ns until SIGKILL, -1: never
WELCOME = struct.Struct("<HH")  # cid, what follows: the allow list as JSON
FINAL = struct.Struct("<IiiIq")  # kind, exit code, signal, restarts, Unix time in ns


class Message(IntEnum):
    """slot and generation name a registration unless it says otherwise."""

    # client -> supervisor
    KICK = 1  # look at the dirty bits
    HELLO = 2  # slot: own pid, generation: the challenge's nonce; body: HELLO
    SUBSCRIBE = 3  # answered by one NOTIFY at once (or FINAL), then one for every change
    UNSUBSCRIBE = 4
    TERMINATE = 5  # body: grace; TERM is set in shared memory when it is sent
    CANCEL = 6  # SIGINT to the worker
    WAKE = 7  # end the worker's wait
    STOP = 8  # slot: ShutdownMode
    DETACH = 9  # nothing is in flight and the mapping is gone
    # worker -> supervisor, on its own channel
    ATTACHED = 16  # about to use the domain's shared memory: from here on it may leave it dirty
    READY = 17
    CONSISTENT = 18  # the startup worker alone
    TITLE = 19  # body: what it does now
    ERROR = 20  # body: the end of a traceback
    CLEAN = 21  # its last act
    JOIN = 22  # wants a client connection; answered by WELCOME with it, or REFUSED
    # supervisor -> client
    CHALLENGE = 32  # generation: a nonce
    WELCOME = 33  # body: WELCOME; with outbox, inbox, pidfd (and, after JOIN, the connection)
    REFUSED = 34  # body: why
    NOTIFY = 35  # look at the slot
    FINAL = 36  # it is gone; body: FINAL
    OVERFLOW = 37  # messages were dropped: look at everything
    CAPACITY = 38  # not subscribed: too many are
    # supervisor -> worker
    LAUNCH = 48  # what a process that was started ahead is to be: see _launch.hand_over()
    AWAKE = 49


def pack(type: Message, slot: int = 0, generation: int = 0, body: bytes = b"") -> bytes:
    return HEAD.pack(type, slot, generation) + body


def unpack(data: bytes) -> tuple[int, int, int, bytes] | None:
    """(type, slot, generation, body), or None if it is too short to be a message."""
    if len(data) < HEAD.size:
        return None
    return *HEAD.unpack_from(data), data[HEAD.size :]


def receive(sock: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """A message and the descriptors that came with it, at most 8, closed on exec.

    socket.recv_fds() will not do: in CPython 3.11 it drops its flags, MSG_DONTWAIT among them.
    """
    fds = array("i")
    room = socket.CMSG_LEN(8 * fds.itemsize)
    data, ancillary, _, _ = sock.recvmsg(65536, room, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, body in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
    return data, list(fds)


def entry_allowed(entry: str, allow: Iterable[str]) -> bool:
    """Tell whether one of the patterns lets clients ask for `entry`, "module:function".

    "mylib.*" takes all of mylib, its own functions and those of its modules; "mylib:*" its own
    functions alone; a name without "*" itself; "*" everything.  What has a dot after the colon
    needs a pattern that has one there ("mylib:Class.*"): else "mylib.*" would take
    "mylib:os.system" as soon as mylib imports os.
    """
    dotted = entry.replace(":", ".")
    if "." in entry.partition(":")[2]:
        allow = [p for p in allow if p == "*" or "." in p.partition(":")[2]]
    return any(fnmatchcase(entry, pattern) or fnmatchcase(dotted, pattern) for pattern in allow)
