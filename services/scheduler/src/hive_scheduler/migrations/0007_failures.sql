-- Failures as data: one row of a fixed size for each attempt that failed, and for each task that failed without one.
-- Messages are not copied: a kind of failure has its normalised one, and examples are read from the log.

CREATE TABLE scheduler.failures (
    ns text COLLATE "C" NOT NULL,
    owner text NOT NULL,
    -- Where the event stands in the log.
    position bigint NOT NULL,
    fingerprint text COLLATE "C" NOT NULL,
    at_us bigint NOT NULL,
    job_id text COLLATE "C" NOT NULL,
    task_id text COLLATE "C" NOT NULL,
    step text NOT NULL,
    -- 0: the task failed without one.
    attempt integer NOT NULL,
    agent text COLLATE "C" NOT NULL,
    executor text NOT NULL,
    input_digest text NOT NULL,
    wall_ms bigint NOT NULL,
    PRIMARY KEY (ns, position)
);

CREATE INDEX failures_by_time ON scheduler.failures (ns, at_us DESC);
CREATE INDEX failures_of_a_kind ON scheduler.failures (ns, fingerprint, position DESC);

CREATE TABLE scheduler.failure_kinds (
    ns text COLLATE "C" NOT NULL,
    owner text NOT NULL,
    fingerprint text COLLATE "C" NOT NULL,
    agent text COLLATE "C" NOT NULL,
    code text NOT NULL,
    message text NOT NULL,
    PRIMARY KEY (ns, fingerprint)
);

-- What model calls of an attempt used. They may end before it is known how the attempt ended, and after.
CREATE TABLE scheduler.attempt_calls (
    ns text COLLATE "C" NOT NULL,
    owner text NOT NULL,
    task_id text COLLATE "C" NOT NULL,
    attempt integer NOT NULL,
    calls bigint NOT NULL,
    tokens bigint NOT NULL,
    nano_usd bigint NOT NULL,
    PRIMARY KEY (ns, task_id, attempt)
);
