-- Every column is CLOCK_MONOTONIC in ns, or a number of ns if it ends in _ns: see pgbgw_bench.c.

CREATE FUNCTION bench_pairs(size int, begin_at bigint, end_at bigint,
    OUT begun bigint, OUT registered bigint, OUT terminated bigint, OUT cpu_before_ns bigint,
    OUT cpu_after_ns bigint) RETURNS SETOF record
AS 'MODULE_PATHNAME' LANGUAGE C STRICT;

CREATE FUNCTION bench_launches(rounds int, size int, begin_at bigint,
    OUT begun bigint, OUT registered bigint, OUT entered bigint, OUT started bigint,
    OUT stopped bigint) RETURNS SETOF record
AS 'MODULE_PATHNAME' LANGUAGE C STRICT;

CREATE FUNCTION bench_polls(polls bigint, begin_at bigint,
    OUT begun bigint, OUT ended bigint, OUT cpu_ns bigint) RETURNS SETOF record
AS 'MODULE_PATHNAME' LANGUAGE C STRICT;

CREATE FUNCTION bench_restarts(rounds int, OUT left_at bigint, OUT visible bigint)
    RETURNS SETOF record
AS 'MODULE_PATHNAME' LANGUAGE C STRICT;

CREATE FUNCTION bench_refusals(calls int, OUT begun bigint, OUT ended bigint)
    RETURNS SETOF record
AS 'MODULE_PATHNAME' LANGUAGE C STRICT;

CREATE FUNCTION bench_residents(workers int) RETURNS int
AS 'MODULE_PATHNAME' LANGUAGE C STRICT;
