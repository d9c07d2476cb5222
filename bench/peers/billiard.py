"""billiard: celery's multiprocessing."""

from __future__ import annotations

import billiard

from _subject import serve
from peers._processes import questions

if __name__ == "__main__":
    serve(questions("billiard.pool", billiard.Process, billiard.Pool))
