-- Keys for the API. Of their secrets only digests.

CREATE TABLE registry.api_keys (
    ns text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    owner text NOT NULL,
    stream text COLLATE "C" NOT NULL,
    digest text COLLATE "C" NOT NULL,
    scope text NOT NULL,
    pin text NOT NULL,
    counts_only boolean NOT NULL,
    cloud boolean NOT NULL,
    pseudonym text NOT NULL,
    created_us bigint NOT NULL,
    revoked_us bigint NOT NULL DEFAULT 0,
    version integer NOT NULL,
    position bigint NOT NULL,
    PRIMARY KEY (ns, name)
);

CREATE UNIQUE INDEX api_keys_digest ON registry.api_keys (ns, digest);
CREATE UNIQUE INDEX api_keys_stream ON registry.api_keys (ns, stream);
