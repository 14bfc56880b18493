-- A key of users sees the jobs that it submitted, and finds them among those of all others.

CREATE INDEX jobs_of_caller ON scheduler.jobs (ns, caller, submitted_position DESC);
