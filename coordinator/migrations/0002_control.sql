-- What an owner may ask of a running job, and the job's log.

-- A pause or a stop that waits for the open round to be closed; '' for none.
ALTER TABLE job ADD COLUMN order_kind TEXT NOT NULL DEFAULT '' CHECK (order_kind IN ('', 'pause', 'stop'));
ALTER TABLE job ADD COLUMN order_reason TEXT NOT NULL DEFAULT '';
-- Changed settings that wait until pipelines are next formed.
ALTER TABLE job ADD COLUMN next_spec_json TEXT;
-- The highest generation of a round that was discarded: later ones count from there on.
ALTER TABLE job ADD COLUMN lineage INTEGER NOT NULL DEFAULT 0;

-- What happened to a job, for people. Bounded: the oldest go first. Not rewound with the rounds.
CREATE TABLE event (
    job_id       TEXT NOT NULL REFERENCES job,
    seq          INTEGER NOT NULL,
    unix_s       REAL NOT NULL,
    kind         TEXT NOT NULL,
    round        INTEGER NOT NULL,
    text         TEXT NOT NULL,
    peer         TEXT NOT NULL,
    pipeline_id  INTEGER,
    loss         REAL,
    tokens       INTEGER NOT NULL,
    bytes        INTEGER NOT NULL,
    PRIMARY KEY (job_id, seq)
) STRICT;
