-- Every row says whose it is, and every key begins with the namespace.

ALTER TABLE scheduler.jobs ALTER COLUMN ns TYPE text COLLATE "C";
ALTER TABLE scheduler.jobs DROP CONSTRAINT jobs_pkey;
ALTER TABLE scheduler.jobs ADD PRIMARY KEY (ns, job_id);
DROP INDEX scheduler.jobs_newest;
CREATE INDEX jobs_newest ON scheduler.jobs (ns, submitted_position DESC);

ALTER TABLE scheduler.tasks ADD COLUMN ns text COLLATE "C", ADD COLUMN owner text;
UPDATE scheduler.tasks AS v
   SET ns = convert_from(e.event, 'UTF8')::json ->> 'ns', owner = convert_from(e.event, 'UTF8')::json ->> 'owner'
  FROM log.events e WHERE e.position = v.created_position;
ALTER TABLE scheduler.tasks ALTER COLUMN ns SET NOT NULL, ALTER COLUMN owner SET NOT NULL;
ALTER TABLE scheduler.tasks DROP CONSTRAINT tasks_pkey;
ALTER TABLE scheduler.tasks ADD PRIMARY KEY (ns, task_id);
DROP INDEX scheduler.tasks_of_job;
CREATE INDEX tasks_of_job ON scheduler.tasks (ns, job_id, created_position);

ALTER TABLE scheduler.steps ADD COLUMN ns text COLLATE "C", ADD COLUMN owner text;
UPDATE scheduler.steps AS v
   SET ns = convert_from(e.event, 'UTF8')::json ->> 'ns', owner = convert_from(e.event, 'UTF8')::json ->> 'owner'
  FROM log.events e WHERE e.position = v.first_position;
ALTER TABLE scheduler.steps ALTER COLUMN ns SET NOT NULL, ALTER COLUMN owner SET NOT NULL;
ALTER TABLE scheduler.steps DROP CONSTRAINT steps_pkey;
ALTER TABLE scheduler.steps ADD PRIMARY KEY (ns, job_id, step);

ALTER TABLE scheduler.job_positions ADD COLUMN ns text COLLATE "C", ADD COLUMN owner text;
UPDATE scheduler.job_positions AS v
   SET ns = convert_from(e.event, 'UTF8')::json ->> 'ns', owner = convert_from(e.event, 'UTF8')::json ->> 'owner'
  FROM log.events e WHERE e.position = v.first_position;
ALTER TABLE scheduler.job_positions ALTER COLUMN ns SET NOT NULL, ALTER COLUMN owner SET NOT NULL;
ALTER TABLE scheduler.job_positions DROP CONSTRAINT job_positions_pkey;
ALTER TABLE scheduler.job_positions ADD PRIMARY KEY (ns, job_id, first_position);
