-- Rounds that overlap: a pipeline may hold a second lease, of samples for the round after.

-- `ahead` 1: for the round after `round`; the pipeline formed of the same nodes then takes it over (0).
CREATE TABLE lease_6 (
    job_id       TEXT NOT NULL,
    lease_id     INTEGER NOT NULL,
    round        INTEGER NOT NULL,
    pipeline_id  INTEGER NOT NULL,
    ahead        INTEGER NOT NULL DEFAULT 0 CHECK (ahead IN (0, 1)),
    state        TEXT NOT NULL CHECK (state IN ('open', 'closed', 'void')),
    PRIMARY KEY (job_id, lease_id),
    UNIQUE (job_id, round, pipeline_id, ahead),
    FOREIGN KEY (job_id, round, pipeline_id) REFERENCES pipeline
) STRICT;
CREATE TABLE lease_range_6 (
    job_id       TEXT NOT NULL,
    lease_id     INTEGER NOT NULL,
    range_start  INTEGER NOT NULL,
    range_end    INTEGER NOT NULL CHECK (range_end > range_start),
    PRIMARY KEY (job_id, lease_id, range_start),
    FOREIGN KEY (job_id, lease_id) REFERENCES lease_6
) STRICT;
INSERT INTO lease_6 SELECT job_id, lease_id, round, pipeline_id, 0, state FROM lease;
INSERT INTO lease_range_6 SELECT * FROM lease_range;
DROP TABLE lease_range;
DROP TABLE lease;
ALTER TABLE lease_6 RENAME TO lease;
ALTER TABLE lease_range_6 RENAME TO lease_range;
