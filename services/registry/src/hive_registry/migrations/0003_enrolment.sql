-- Who may take part: the keys of executors, and the tokens with which machines join.
-- An executor is there from its enrolment on, before its first hello.

ALTER TABLE registry.executors
    ALTER COLUMN capabilities DROP NOT NULL,
    ADD COLUMN public_key text NOT NULL DEFAULT '',
    ADD COLUMN owner_name text NOT NULL DEFAULT '',
    ADD COLUMN revoked_us bigint;

-- All of them go to NATS at every connection to it.
CREATE INDEX executors_revoked ON registry.executors (ns, revoked_us) WHERE revoked_us IS NOT NULL;

CREATE TABLE registry.join_tokens (
    ns text COLLATE "C" NOT NULL,
    token text COLLATE "C" NOT NULL,
    digest text NOT NULL,
    expires_us bigint NOT NULL,
    owner text NOT NULL,
    owner_name text NOT NULL,
    executor text NOT NULL DEFAULT '',
    version integer NOT NULL CHECK (version > 0),
    position bigint NOT NULL,
    PRIMARY KEY (ns, token)
);
