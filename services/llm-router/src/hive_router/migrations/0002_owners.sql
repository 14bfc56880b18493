-- Whose device it is that serves a model.

ALTER TABLE router.executor_models ADD COLUMN owner text;
UPDATE router.executor_models AS v SET owner = convert_from(e.event, 'UTF8')::json ->> 'owner'
  FROM log.events e WHERE e.stream = v.executor AND e.version = 1;
ALTER TABLE router.executor_models ALTER COLUMN owner SET NOT NULL;
