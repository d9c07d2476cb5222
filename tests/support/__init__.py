"""What the tests share, importable in the test process and in the workers that it starts."""

from support.waiting import poll_until

__all__ = ["poll_until"]
