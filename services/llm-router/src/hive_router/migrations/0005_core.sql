-- Calls that an executor of tier `core`, or a provider, has answered.
ALTER TABLE router.usage ADD COLUMN core bigint NOT NULL DEFAULT 0;
UPDATE router.usage SET core = calls - failed WHERE provider <> '';
