-- Whose a version is: who published it.

ALTER TABLE registry.agent_versions ADD COLUMN owner text;
UPDATE registry.agent_versions AS v SET owner = convert_from(e.event, 'UTF8')::json ->> 'owner'
  FROM log.events e WHERE e.position = v.position;
ALTER TABLE registry.agent_versions ALTER COLUMN owner SET NOT NULL;
