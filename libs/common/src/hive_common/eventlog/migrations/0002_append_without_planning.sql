-- log_append as before, at less cost for a small append: it is not planned again for every call, and arrays are
-- taken by index, where unnest copied all of them first.

SET LOCAL ROLE hive_log_owner;

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
CREATE OR REPLACE FUNCTION log.log_append(
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
-- The plans do not depend on what comes in; without this they are made anew for every call.
SET plan_cache_mode = force_generic_plan
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
                          WHERE l.stream = streams[i] ORDER BY l.version DESC LIMIT 1), 0)
          FROM generate_series(1, cardinality(streams)) AS i ORDER BY i
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
    SELECT out_positions[i], streams[event_streams[i]], event_versions[i], event_types[i], out_events[i], out_hashes[i]
      FROM generate_series(1, event_total) AS i WHERE out_positions[i] IS NOT NULL;
    INSERT INTO log.payloads (position, payload, salt)
    SELECT out_positions[i], event_payloads[i], salts[i]
      FROM generate_series(1, event_total) AS i WHERE out_positions[i] IS NOT NULL;
END
$$;

RESET ROLE;
