"""A module with 100 MB of small objects, as large libraries have them."""

MEGABYTES = 100
# About 100 bytes each: a tuple of one int and its place in the list.
OBJECTS = [(i + 1_000_000,) for i in range(MEGABYTES * (1 << 20) // 88)]
