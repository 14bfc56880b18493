-- Jobs that give an executor a task with a known answer: nobody asked for them, and lists leave them out.

ALTER TABLE scheduler.jobs ADD COLUMN canary text NOT NULL DEFAULT '';
