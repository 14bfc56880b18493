-- The task that forked this one; empty for a task that stands in the job file.
ALTER TABLE scheduler.tasks ADD COLUMN parent text NOT NULL DEFAULT '';
