-- Of tasks whose results are judged, and of judges: JSON (`views.Judged`); empty for all others.
ALTER TABLE scheduler.tasks ADD COLUMN judged text NOT NULL DEFAULT '';
