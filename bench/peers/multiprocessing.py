"""multiprocessing, by fork or spawn (the variant)."""

from __future__ import annotations

import json
import multiprocessing
import sys

from _subject import serve
from peers._processes import questions

if __name__ == "__main__":
    options = json.loads(sys.argv[2]) if sys.argv[2:] else {}
    context = multiprocessing.get_context(options.get("variant", "fork"))
    serve(questions("multiprocessing.pool", context.Process, context.Pool))
