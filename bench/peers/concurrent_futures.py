"""concurrent.futures.ProcessPoolExecutor, by fork."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from _subject import serve
from peers._executors import questions


def make(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork"))


if __name__ == "__main__":
    serve(questions("concurrent.futures.process", make, most=256))
