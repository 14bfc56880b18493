-- Views of jobs and tasks, written by one projection of the log, and the leader's epoch.

CREATE TABLE scheduler.leadership (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch bigint NOT NULL CHECK (epoch > 0),
    since_us bigint NOT NULL
);

CREATE TABLE scheduler.jobs (
    job_id text COLLATE "C" PRIMARY KEY,
    ns text NOT NULL,
    owner text NOT NULL,
    name text NOT NULL,
    state text NOT NULL CHECK (state IN ('running', 'cancelling', 'succeeded', 'failed', 'cancelled')),
    priority text NOT NULL,
    caller text NOT NULL,
    submitted_us bigint NOT NULL,
    ended_us bigint NOT NULL DEFAULT 0,
    deadline_us bigint NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    error_code text NOT NULL DEFAULT '',
    error_message text NOT NULL DEFAULT '',
    error_task text NOT NULL DEFAULT '',
    -- Where JobSubmitted stands, and the terminal event; outputs are read from the log, not copied here.
    submitted_position bigint NOT NULL,
    ended_position bigint NOT NULL DEFAULT 0,
    CHECK ((ended_us = 0) = (state IN ('running', 'cancelling')))
);

CREATE INDEX jobs_newest ON scheduler.jobs (submitted_position DESC);
CREATE INDEX jobs_open ON scheduler.jobs (submitted_position) WHERE ended_us = 0;

CREATE TABLE scheduler.tasks (
    task_id text COLLATE "C" PRIMARY KEY,
    job_id text COLLATE "C" NOT NULL,
    step text NOT NULL,
    idx integer NOT NULL,
    agent text NOT NULL,
    state text NOT NULL CHECK (state IN ('blocked', 'ready', 'active', 'succeeded', 'failed', 'cancelled')),
    attempts integer NOT NULL DEFAULT 0,
    executor text NOT NULL DEFAULT '',
    error_code text NOT NULL DEFAULT '',
    error_message text NOT NULL DEFAULT '',
    created_us bigint NOT NULL,
    ended_us bigint NOT NULL DEFAULT 0,
    created_position bigint NOT NULL,
    -- Of the attempt's success that decided, 0 without one; and of every report with a log.
    output_position bigint NOT NULL DEFAULT 0,
    report_positions bigint[] NOT NULL DEFAULT '{}',
    CHECK ((ended_us = 0) = (state IN ('blocked', 'ready', 'active')))
) WITH (fillfactor = 70);

CREATE INDEX tasks_of_job ON scheduler.tasks (job_id, created_position);

CREATE TABLE scheduler.steps (
    job_id text COLLATE "C" NOT NULL,
    step text NOT NULL,
    agent text NOT NULL,
    first_position bigint NOT NULL,
    blocked integer NOT NULL DEFAULT 0,
    ready integer NOT NULL DEFAULT 0,
    active integer NOT NULL DEFAULT 0,
    succeeded integer NOT NULL DEFAULT 0,
    failed integer NOT NULL DEFAULT 0,
    cancelled integer NOT NULL DEFAULT 0,
    PRIMARY KEY (job_id, step)
) WITH (fillfactor = 70);

-- Which positions of the log are about a job: a few arrays instead of a row for each event.
CREATE TABLE scheduler.job_positions (
    job_id text COLLATE "C" NOT NULL,
    first_position bigint NOT NULL,
    last_position bigint NOT NULL,
    positions bigint[] NOT NULL,
    PRIMARY KEY (job_id, first_position)
);
