-- Valid, invalid, late and lost results of executors, by one projection of the log.

CREATE TABLE scheduler.reputation (
    ns text COLLATE "C" NOT NULL,
    executor text COLLATE "C" NOT NULL,
    owner text NOT NULL,
    -- The last results that were judged, oldest first: true is valid.
    judged boolean[] NOT NULL,
    quarantined boolean NOT NULL,
    valid bigint NOT NULL,
    invalid bigint NOT NULL,
    late bigint NOT NULL,
    lost bigint NOT NULL,
    PRIMARY KEY (ns, executor)
);

CREATE TABLE scheduler.reputation_of_agents (
    ns text COLLATE "C" NOT NULL,
    executor text COLLATE "C" NOT NULL,
    agent text COLLATE "C" NOT NULL,
    owner text NOT NULL,
    in_a_row bigint NOT NULL,
    valid bigint NOT NULL,
    invalid bigint NOT NULL,
    late bigint NOT NULL,
    lost bigint NOT NULL,
    -- Which of an executor's agents is dropped when there are too many: the one that changed longest ago.
    position bigint NOT NULL,
    PRIMARY KEY (ns, executor, agent)
);
