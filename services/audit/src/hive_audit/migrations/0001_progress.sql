-- How far the auditor has verified the log, and what it has counted on the way.

CREATE TABLE audit.progress (
    -- One row.
    one_row boolean PRIMARY KEY DEFAULT true CHECK (one_row),
    log_id text COLLATE "C" NOT NULL,
    position bigint NOT NULL CHECK (position >= 0),
    hash bytea NOT NULL CHECK (octet_length(hash) = 32),
    broken_position bigint,
    broken_reason text,
    CHECK ((broken_position IS NULL) = (broken_reason IS NULL))
);

CREATE TABLE audit.counts (
    kind text COLLATE "C" PRIMARY KEY,
    events bigint NOT NULL CHECK (events >= 0)
);
