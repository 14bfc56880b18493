-- The models that executors report. Holds nothing that the log does not; it can be dropped and rebuilt.

CREATE TABLE router.executor_models (
    ns text COLLATE "C" NOT NULL,
    executor text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    backend text COLLATE "C" NOT NULL,
    family text NOT NULL,
    size_bytes bigint NOT NULL,
    quantisation text NOT NULL,
    context_tokens bigint NOT NULL,
    loaded boolean NOT NULL,
    PRIMARY KEY (ns, executor, name, backend)
);

CREATE INDEX executor_models_name ON router.executor_models (ns, name, executor);
