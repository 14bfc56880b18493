-- What agents keep between tasks: values by namespace and key, and what attempts have staged that are not decided.
-- Both hold nothing that the log does not; `stream` is the namespace's.

CREATE TABLE registry.kv_values (
    ns text COLLATE "C" NOT NULL,
    stream text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    value bytea NOT NULL,
    size_bytes integer NOT NULL,
    position bigint NOT NULL,
    PRIMARY KEY (ns, stream, key)
);

CREATE TABLE registry.kv_streams (
    ns text COLLATE "C" NOT NULL,
    stream text COLLATE "C" NOT NULL,
    owner text NOT NULL,
    namespace text NOT NULL,
    version integer NOT NULL CHECK (version > 0),
    PRIMARY KEY (ns, stream)
);

CREATE TABLE registry.kv_staged (
    ns text COLLATE "C" NOT NULL,
    task text COLLATE "C" NOT NULL,
    attempt integer NOT NULL,
    stream text COLLATE "C" NOT NULL,
    writes bytea NOT NULL,
    position bigint NOT NULL,
    PRIMARY KEY (ns, task, attempt)
);

CREATE INDEX kv_staged_of_stream ON registry.kv_staged (ns, stream, position);
