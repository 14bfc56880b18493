-- Whose a value is: whose its namespace is.

ALTER TABLE registry.kv_values ADD COLUMN owner text;
ALTER TABLE registry.kv_staged ADD COLUMN owner text;
UPDATE registry.kv_values v SET owner = s.owner FROM registry.kv_streams s WHERE (s.ns, s.stream) = (v.ns, v.stream);
UPDATE registry.kv_staged v SET owner = s.owner FROM registry.kv_streams s WHERE (s.ns, s.stream) = (v.ns, v.stream);
ALTER TABLE registry.kv_values ALTER COLUMN owner SET NOT NULL;
ALTER TABLE registry.kv_staged ALTER COLUMN owner SET NOT NULL;
