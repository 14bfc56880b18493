-- What agents were granted. A grant that was taken back stays as a row without `granted`: the version of the stream is
-- the highest one of its rows.

CREATE TABLE registry.grants (
    ns text COLLATE "C" NOT NULL,
    agent text COLLATE "C" NOT NULL,
    permission text COLLATE "C" NOT NULL,
    owner text NOT NULL,
    granted bytea,
    asked bytea,
    ask boolean NOT NULL DEFAULT false,
    until_us bigint NOT NULL DEFAULT 0,
    since_us bigint NOT NULL,
    version integer NOT NULL CHECK (version > 0),
    position bigint NOT NULL,
    PRIMARY KEY (ns, agent, permission)
);
