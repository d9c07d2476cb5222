"""A page that whoever touches it waits for: a slow disk or file system, made of userfaultfd."""

from __future__ import annotations

import ctypes
import os
import platform
import select

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_UFFD_API, _MISSING = 0xAA, 1
_PROT_READ_WRITE, _PRIVATE_ANONYMOUS = 3, 0x22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.send.argtypes = _libc.recv.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
]


def stalling_page() -> int:
    """The address of a page that is never there.  OSError if the kernel does not let us."""
    number = _SYS_USERFAULTFD.get(platform.machine())
    if number is None:
        raise OSError("userfaultfd has another number here")
    fd = _checked(_libc.syscall(number, os.O_CLOEXEC))
    _checked(_libc.ioctl(fd, _UFFDIO_API, (ctypes.c_uint64 * 3)(_UFFD_API, 0, 0)))
    page = _libc.mmap(None, 4096, _PROT_READ_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
    range_and_mode = (ctypes.c_uint64 * 4)(page, 4096, _MISSING, 0)
    _checked(_libc.ioctl(fd, _UFFDIO_REGISTER, range_and_mode))
    return int(page)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def send_from(fd: int, page: int) -> None:
    """Send a message that is in the page: never returns."""
    _libc.send(fd, page, 64, 0)


def receive_into(fd: int, page: int) -> None:
    """Wait for a message, and receive it into the page: never returns."""
    select.select([fd], [], [])  # the socket does not block
    _libc.recv(fd, page, 64, 0)
