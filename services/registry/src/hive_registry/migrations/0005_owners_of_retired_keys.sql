-- Whose a key was: who owned its executor when it was enrolled.

ALTER TABLE registry.retired_keys ADD COLUMN owner text;
UPDATE registry.retired_keys AS k SET owner = convert_from(e.event, 'UTF8')::json ->> 'owner'
  FROM log.events e JOIN log.payloads p ON p.position = e.position
  WHERE e.type = 'ExecutorEnrolled' AND convert_from(p.payload, 'UTF8')::json ->> 'public_key' = k.public_key;
ALTER TABLE registry.retired_keys ALTER COLUMN owner SET NOT NULL;
