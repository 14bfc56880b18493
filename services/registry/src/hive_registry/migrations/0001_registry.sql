-- Views of executors and agents. They hold nothing that the log does not; they can be dropped and rebuilt.

CREATE TABLE registry.executors (
    ns text COLLATE "C" NOT NULL,
    executor text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    owner text NOT NULL,
    capabilities bytea NOT NULL,
    drained boolean NOT NULL DEFAULT false,
    version integer NOT NULL CHECK (version > 0),
    registered_us bigint NOT NULL,
    position bigint NOT NULL,
    PRIMARY KEY (ns, executor)
);

-- Names are labels that people give; two devices may have the same.
CREATE INDEX executors_name ON registry.executors (ns, name);

CREATE TABLE registry.agent_versions (
    ns text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    version text COLLATE "C" NOT NULL,
    version_key text COLLATE "C" NOT NULL,
    digest text COLLATE "C" NOT NULL,
    manifest bytea NOT NULL,
    size_bytes bigint NOT NULL,
    published_us bigint NOT NULL,
    position bigint NOT NULL,
    PRIMARY KEY (ns, name, version)
);

CREATE UNIQUE INDEX agent_versions_order ON registry.agent_versions (ns, name, version_key, version);
