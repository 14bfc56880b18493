-- Keys of authors, who signed a version, and what was yanked. Versions of before there were signatures have no signer.

CREATE TABLE registry.signers (
    ns text COLLATE "C" NOT NULL,
    public_key text COLLATE "C" NOT NULL,
    stream text COLLATE "C" NOT NULL,
    owner text NOT NULL,
    name text COLLATE "C" NOT NULL,
    trusted boolean NOT NULL,
    since_us bigint NOT NULL,
    reason text NOT NULL DEFAULT '',
    version integer NOT NULL CHECK (version > 0),
    position bigint NOT NULL,
    PRIMARY KEY (ns, public_key)
);

CREATE UNIQUE INDEX signers_stream ON registry.signers (ns, stream);

ALTER TABLE registry.agent_versions ADD COLUMN stream text COLLATE "C";
UPDATE registry.agent_versions AS v SET stream = convert_from(e.event, 'UTF8')::json ->> 'stream'
  FROM log.events e WHERE e.position = v.position;
ALTER TABLE registry.agent_versions ALTER COLUMN stream SET NOT NULL;
ALTER TABLE registry.agent_versions
    ADD COLUMN stream_version integer NOT NULL DEFAULT 1,
    ADD COLUMN signer text NOT NULL DEFAULT '',
    ADD COLUMN signature text NOT NULL DEFAULT '',
    ADD COLUMN yanked_us bigint NOT NULL DEFAULT 0,
    ADD COLUMN yank_reason text NOT NULL DEFAULT '';

CREATE UNIQUE INDEX agent_versions_stream ON registry.agent_versions (ns, stream);
