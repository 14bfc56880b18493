-- A task that fails over the results of its attempts counts what these took, each once. The failures of before are
-- counted anew from the log, and so are their fingerprints, which keep types apart that stand in quotes.

ALTER TABLE scheduler.failures ADD COLUMN attempts integer[] NOT NULL DEFAULT '{}';

TRUNCATE scheduler.failures, scheduler.failure_kinds, scheduler.attempt_calls;

DO $$
BEGIN
    IF to_regclass('scheduler.projections') IS NOT NULL THEN
        DELETE FROM scheduler.projections WHERE name = 'failures';
    END IF;
END $$;
