-- Keys that an executor had before the one it has: what was signed for them is refused, too.

CREATE TABLE registry.retired_keys (
    ns text COLLATE "C" NOT NULL,
    public_key text COLLATE "C" NOT NULL,
    retired_us bigint NOT NULL,
    PRIMARY KEY (ns, public_key)
);

CREATE INDEX retired_keys_latest ON registry.retired_keys (ns, retired_us);
