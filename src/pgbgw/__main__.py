"""`python -m pgbgw`: the command line."""

from __future__ import annotations

import sys

from pgbgw.cli import main

if __name__ == "__main__":
    sys.exit(main())
