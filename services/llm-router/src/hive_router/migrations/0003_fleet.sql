-- Devices of the pool with all that a choice between them looks at. Their models are part of what they report; the
-- projection has a new name and so begins anew.

DROP TABLE router.executor_models;

CREATE TABLE router.executors (
    ns text COLLATE "C" NOT NULL,
    executor text COLLATE "C" NOT NULL,
    name text NOT NULL,
    owner text NOT NULL,
    capabilities bytea NOT NULL,
    drained boolean NOT NULL DEFAULT false,
    revoked boolean NOT NULL DEFAULT false,
    PRIMARY KEY (ns, executor)
);
