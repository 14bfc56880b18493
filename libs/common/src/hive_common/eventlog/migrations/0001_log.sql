-- The event log: one gapless hash chain, append-only, with payloads beside it that may go.

DO $$
DECLARE
    role_name text;
BEGIN
    FOREACH role_name IN ARRAY ARRAY['hive_log_owner', 'hive_log_writer', 'hive_log_reader'] LOOP
        BEGIN
            EXECUTE format('CREATE ROLE %I NOLOGIN', role_name);
        EXCEPTION
            -- Roles belong to the cluster; another database of it may have made them.
            WHEN duplicate_object OR unique_violation THEN NULL;
        END;
    END LOOP;
END
$$;

ALTER SCHEMA log OWNER TO hive_log_owner;
SET LOCAL ROLE hive_log_owner;

CREATE TABLE log.events (
    position bigint PRIMARY KEY CHECK (position > 0),
    stream text COLLATE "C" NOT NULL CHECK (octet_length(stream) BETWEEN 1 AND 200),
    version integer NOT NULL CHECK (version > 0),
    type text COLLATE "C" NOT NULL CHECK (octet_length(type) BETWEEN 1 AND 200),
    event bytea NOT NULL CHECK (octet_length(event) BETWEEN 2 AND 65536),
    hash bytea NOT NULL CHECK (octet_length(hash) = 32),
    CONSTRAINT events_stream_version UNIQUE (stream, version)
);

-- Law 2: a task and a job end once. Their streams are disjoint, so one index serves both.
CREATE UNIQUE INDEX events_terminal ON log.events (stream)
    WHERE type IN ('TaskSucceeded', 'TaskFailed', 'TaskCancelled',
                   'JobSucceeded', 'JobFailed', 'JobCancelled');

-- Nearly all rows are about tasks and attempts. Readers of the rest (registry, audit, gateway) would scan
-- the whole log without this. It is ordered by position because they read in that order.
CREATE INDEX events_rare ON log.events (position, type)
    WHERE type NOT LIKE 'Task%' AND type NOT LIKE 'Attempt%';

-- No foreign key to events: only log_append inserts, and the check would cost more than the row itself.
CREATE TABLE log.payloads (
    position bigint PRIMARY KEY CHECK (position > 0),
    payload bytea NOT NULL CHECK (octet_length(payload) <= 4194304),
    -- HMAC pads short keys with zeros, so salts of different lengths could collide.
    salt bytea NOT NULL CHECK (octet_length(salt) = 32)
);

CREATE FUNCTION log.refuse_change() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'log.% is append-only: % refused', TG_TABLE_NAME, TG_OP
        USING ERRCODE = 'insufficient_privilege';
END
$$;

CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON log.events
    FOR EACH STATEMENT EXECUTE FUNCTION log.refuse_change();
ALTER TABLE log.events ENABLE ALWAYS TRIGGER events_append_only;
-- DELETE stays possible: erasure and retention remove payloads, after an event that says so.
CREATE TRIGGER payloads_never_change BEFORE UPDATE OR TRUNCATE ON log.payloads
    FOR EACH STATEMENT EXECUTE FUNCTION log.refuse_change();
ALTER TABLE log.payloads ENABLE ALWAYS TRIGGER payloads_never_change;

-- Writes the first event. `body` is the envelope without its two leading fields (see log_append).
CREATE FUNCTION log.log_create(log_stream text, body bytea, payload bytea, salt bytea) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    event bytea := convert_to(format('{"position":1,"prev":"%s",', repeat('0', 64)), 'UTF8') || body;
BEGIN
    PERFORM pg_advisory_xact_lock(29387505148686183);
    IF EXISTS (SELECT FROM log.events WHERE position = 1) THEN
        RAISE EXCEPTION 'the log exists already' USING ERRCODE = 'unique_violation';
    END IF;
    INSERT INTO log.events VALUES (1, log_stream, 1, 'LogCreated', event, sha256('\x00'::bytea || event));
    INSERT INTO log.payloads VALUES (1, payload, salt);
END
$$;

-- Appends a batch in one statement.
--
-- An append is a run of preconditions and a run of events in the flattened arrays; streams are named by their
-- index in `streams`. Appends are taken in order and see the ones before them. One whose precondition does
-- not hold is left out and reported; the others go in. `bodies` are envelopes from their third field on, made
-- by the client: `{"position":N,"prev":"<hex>",` is set in front of them here, under the lock, and what comes
-- out is hashed and stored as it is.
--
-- Answers one element per append: the position of its last event (0 where it conflicts), and for a conflict
-- the index of the stream and the version at which that stream stands.
CREATE FUNCTION log.log_append(
    streams text[],
    precondition_counts integer[],
    event_counts integer[],
    precondition_streams integer[],
    precondition_versions integer[],
    event_streams integer[],
    event_versions integer[],
    event_types text[],
    bodies bytea[],
    event_payloads bytea[],
    salts bytea[],
    OUT positions bigint[],
    OUT conflict_streams integer[],
    OUT actual_versions integer[]
)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- The plan is kept for the life of the connection, also one made while the table was empty.
SET enable_seqscan = off
AS $$
DECLARE
    event_total CONSTANT integer := coalesce(cardinality(bodies), 0);
    heads integer[];
    head bigint;
    prev bytea;
    event bytea;
    out_positions bigint[] := array_fill(NULL::bigint, ARRAY[event_total]);
    out_events bytea[] := array_fill(NULL::bytea, ARRAY[event_total]);
    out_hashes bytea[] := array_fill(NULL::bytea, ARRAY[event_total]);
    p integer := 0;
    p_end integer;
    e integer := 0;
    e_end integer;
    s integer;
    conflict boolean;
BEGIN
    IF event_total > 1000 THEN
        RAISE EXCEPTION 'a call carries at most 1000 events, not %', event_total
            USING ERRCODE = 'program_limit_exceeded';
    END IF;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        -- A snapshot from before the lock would not show what was appended meanwhile.
        RAISE EXCEPTION 'appends need the isolation level read committed, not %',
            current_setting('transaction_isolation') USING ERRCODE = 'invalid_transaction_state';
    END IF;
    PERFORM pg_advisory_xact_lock(29387505148686183);

    SELECT l.position, l.hash INTO head, prev FROM log.events l ORDER BY l.position DESC LIMIT 1;
    IF head IS NULL THEN
        RAISE EXCEPTION 'the log has no genesis event' USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    heads := ARRAY(
        SELECT coalesce((SELECT l.version FROM log.events l
                          WHERE l.stream = wanted.stream ORDER BY l.version DESC LIMIT 1), 0)
          FROM unnest(streams) WITH ORDINALITY AS wanted (stream, number) ORDER BY wanted.number
    );

    FOR a IN 1 .. coalesce(cardinality(event_counts), 0) LOOP
        p_end := p + precondition_counts[a];
        e_end := e + event_counts[a];
        conflict := false;
        WHILE p < p_end LOOP
            p := p + 1;
            s := precondition_streams[p];
            IF heads[s] <> precondition_versions[p] THEN
                conflict := true;
                p := p_end;
            END IF;
        END LOOP;
        IF conflict THEN
            positions[a] := 0;
            conflict_streams[a] := s;
            actual_versions[a] := heads[s];
            e := e_end;
            CONTINUE;
        END IF;
        WHILE e < e_end LOOP
            e := e + 1;
            s := event_streams[e];
            IF heads[s] + 1 <> event_versions[e] THEN
                RAISE EXCEPTION 'append %: version % of stream % does not follow %, and no precondition says so',
                    a, event_versions[e], streams[s], heads[s] USING ERRCODE = 'invalid_parameter_value';
            END IF;
            heads[s] := event_versions[e];
            head := head + 1;
            event := convert_to('{"position":' || head || ',"prev":"' || encode(prev, 'hex') || '",', 'UTF8')
                     || bodies[e];
            prev := sha256('\x00'::bytea || event);
            out_positions[e] := head;
            out_events[e] := event;
            out_hashes[e] := prev;
        END LOOP;
        positions[a] := head;
        conflict_streams[a] := 0;
        actual_versions[a] := 0;
    END LOOP;

    INSERT INTO log.events (position, stream, version, type, event, hash)
    SELECT n.position, streams[n.stream], n.version, n.type, n.event, n.hash
      FROM unnest(out_positions, event_streams, event_versions, event_types, out_events, out_hashes)
           AS n (position, stream, version, type, event, hash)
     WHERE n.position IS NOT NULL;
    INSERT INTO log.payloads (position, payload, salt)
    SELECT n.position, n.payload, n.salt
      FROM unnest(out_positions, event_payloads, salts) AS n (position, payload, salt)
     WHERE n.position IS NOT NULL;
END
$$;

REVOKE ALL ON FUNCTION log.log_create FROM PUBLIC;
REVOKE ALL ON FUNCTION log.log_append FROM PUBLIC;
REVOKE ALL ON FUNCTION log.refuse_change FROM PUBLIC;
GRANT USAGE ON SCHEMA log TO hive_log_reader, hive_log_writer;
GRANT SELECT ON log.events, log.payloads TO hive_log_reader, hive_log_writer;
GRANT EXECUTE ON FUNCTION log.log_append TO hive_log_writer;

RESET ROLE;
