-- Keys that may spend, what budgets stand at, and what calls have used. All of it follows from the log.

CREATE TABLE router.keys (
    ns text COLLATE "C" NOT NULL,
    owner text COLLATE "C" NOT NULL,
    pseudonym text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    cloud boolean NOT NULL,
    pin text NOT NULL,
    revoked boolean NOT NULL DEFAULT false,
    stream text COLLATE "C" NOT NULL,
    PRIMARY KEY (ns, pseudonym)
);

-- Revocations name the stream only.
CREATE UNIQUE INDEX keys_stream ON router.keys (ns, stream);

CREATE TABLE router.budgets (
    ns text COLLATE "C" NOT NULL,
    owner text COLLATE "C" NOT NULL,
    subject text COLLATE "C" NOT NULL,
    version integer NOT NULL,
    limits bytea NOT NULL DEFAULT '[]',
    PRIMARY KEY (ns, subject)
);

-- What was set aside and not returned, by process of the router and day.
CREATE TABLE router.budget_blocks (
    ns text COLLATE "C" NOT NULL,
    owner text COLLATE "C" NOT NULL,
    subject text COLLATE "C" NOT NULL,
    block text COLLATE "C" NOT NULL,
    day text COLLATE "C" NOT NULL,
    nano_usd bigint NOT NULL,
    tokens bigint NOT NULL,
    PRIMARY KEY (ns, subject, day, block)
);

CREATE TABLE router.usage (
    ns text COLLATE "C" NOT NULL,
    owner text COLLATE "C" NOT NULL,
    day text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    job text COLLATE "C" NOT NULL,
    agent text COLLATE "C" NOT NULL,
    model text COLLATE "C" NOT NULL,
    route text COLLATE "C" NOT NULL,
    provider text COLLATE "C" NOT NULL,
    block text COLLATE "C" NOT NULL,
    calls bigint NOT NULL,
    failed bigint NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    nano_usd bigint NOT NULL,
    estimated bigint NOT NULL,
    PRIMARY KEY (ns, owner, day, key, job, agent, model, route, provider, block)
);
