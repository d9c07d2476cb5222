"""loky's ProcessPoolExecutor: each worker is an interpreter of its own."""

from __future__ import annotations

from loky import ProcessPoolExecutor

from _subject import serve
from peers._executors import questions

if __name__ == "__main__":
    serve(questions("loky", ProcessPoolExecutor, most=16))
