"""Telling systemd how the supervisor is doing (sd_notify), if systemd asked to be told."""

from __future__ import annotations

import os
import socket


class Systemd:
    """Takes $NOTIFY_SOCKET out of the environment: workers are not to speak for the supervisor."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        # "@name" is a name in the abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def tell(self, *lines: str) -> None:
        """Send "READY=1", "STATUS=..." or "STOPPING=1"; what cannot be sent at once is dropped."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                sock.sendto("\n".join(lines).encode(), flags, self._address)
        except OSError:
            pass
