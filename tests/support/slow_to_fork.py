"""A module to preload: a forked worker stops for a while before it has done anything."""

import os
import time

os.register_at_fork(after_in_child=lambda: time.sleep(0.5))
