-- Nodes, jobs and their rounds. Payloads, parameters and datasets are blobs, named here by SHA-256.

CREATE TABLE node (
    peer        TEXT PRIMARY KEY,
    span_start  INTEGER NOT NULL,
    span_end    INTEGER NOT NULL,
    addrs_json  TEXT NOT NULL,
    device      TEXT NOT NULL,
    dtype       TEXT NOT NULL
) STRICT;

CREATE TABLE job (
    job_id                TEXT PRIMARY KEY,
    ordinal               INTEGER NOT NULL UNIQUE,
    name                  TEXT NOT NULL UNIQUE,
    spec_json             TEXT NOT NULL,
    submitter             TEXT NOT NULL,
    model_hash            BLOB NOT NULL,
    dataset               BLOB NOT NULL CHECK (length(dataset) = 32),
    dataset_size          INTEGER NOT NULL,
    samples               INTEGER NOT NULL,
    trainable_parameters  INTEGER NOT NULL,
    state                 TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'paused', 'finished')),
    reason                TEXT NOT NULL,
    fruitless             INTEGER NOT NULL DEFAULT 0
) STRICT;

-- Round 0 is the job's initial state: it has an outcome and nothing else.
CREATE TABLE round (
    job_id            TEXT NOT NULL REFERENCES job,
    round             INTEGER NOT NULL,
    phase             TEXT NOT NULL CHECK (phase IN ('open', 'frozen', 'aggregated', 'committed')),
    generation        INTEGER NOT NULL DEFAULT 0,
    opened_unix_s     REAL NOT NULL,
    committed_unix_s  REAL,
    entry_hash        BLOB,
    signature         BLOB,
    PRIMARY KEY (job_id, round)
) STRICT;

CREATE TABLE pipeline (
    job_id       TEXT NOT NULL,
    round        INTEGER NOT NULL,
    pipeline_id  INTEGER NOT NULL,
    generation   INTEGER NOT NULL,
    standing     TEXT NOT NULL CHECK (standing IN ('active', 'whole', 'late', 'lost')),
    reason       TEXT NOT NULL,
    PRIMARY KEY (job_id, round, pipeline_id),
    FOREIGN KEY (job_id, round) REFERENCES round
) STRICT;

CREATE TABLE member (
    job_id       TEXT NOT NULL,
    round        INTEGER NOT NULL,
    pipeline_id  INTEGER NOT NULL,
    position     INTEGER NOT NULL,
    peer         TEXT NOT NULL,
    span_start   INTEGER NOT NULL,
    span_end     INTEGER NOT NULL,
    PRIMARY KEY (job_id, round, pipeline_id, position),
    UNIQUE (job_id, round, pipeline_id, peer),
    FOREIGN KEY (job_id, round, pipeline_id) REFERENCES pipeline
) STRICT;

CREATE TABLE contribution (
    job_id        TEXT NOT NULL,
    round         INTEGER NOT NULL,
    generation    INTEGER NOT NULL,
    pipeline_id   INTEGER NOT NULL,
    peer          TEXT NOT NULL,
    lead          INTEGER NOT NULL,
    payload       BLOB NOT NULL CHECK (length(payload) = 32),
    payload_size  INTEGER NOT NULL,
    inner_steps   INTEGER NOT NULL,
    tokens        INTEGER NOT NULL,
    loss          REAL,
    verdict       INTEGER NOT NULL,
    reason        TEXT NOT NULL,
    receipt       BLOB NOT NULL,
    counts        INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (job_id, round, generation, peer),
    FOREIGN KEY (job_id, round, pipeline_id, peer) REFERENCES member (job_id, round, pipeline_id, peer)
) STRICT;

-- A node counts once a round, whatever happens between the generations.
CREATE UNIQUE INDEX contribution_counts_once ON contribution (job_id, round, peer) WHERE counts = 1;

CREATE TABLE lease (
    job_id       TEXT NOT NULL,
    lease_id     INTEGER NOT NULL,
    round        INTEGER NOT NULL,
    pipeline_id  INTEGER NOT NULL,
    state        TEXT NOT NULL CHECK (state IN ('open', 'closed', 'void')),
    PRIMARY KEY (job_id, lease_id),
    UNIQUE (job_id, round, pipeline_id),
    FOREIGN KEY (job_id, round, pipeline_id) REFERENCES pipeline
) STRICT;

CREATE TABLE lease_range (
    job_id       TEXT NOT NULL,
    lease_id     INTEGER NOT NULL,
    range_start  INTEGER NOT NULL,
    range_end    INTEGER NOT NULL CHECK (range_end > range_start),
    PRIMARY KEY (job_id, lease_id, range_start),
    FOREIGN KEY (job_id, lease_id) REFERENCES lease
) STRICT;

CREATE TABLE outcome (
    job_id         TEXT NOT NULL,
    round          INTEGER NOT NULL,
    params_hash    BLOB NOT NULL,
    state_blob     BLOB NOT NULL,
    update_blob    BLOB NOT NULL,
    update_size    INTEGER NOT NULL,
    snapshot_blob  BLOB NOT NULL,
    snapshot_size  INTEGER NOT NULL,
    PRIMARY KEY (job_id, round),
    FOREIGN KEY (job_id, round) REFERENCES round
) STRICT;

CREATE TABLE outcome_block (
    job_id           TEXT NOT NULL,
    round            INTEGER NOT NULL,
    position         INTEGER NOT NULL,
    block            TEXT NOT NULL,
    params_hash      BLOB NOT NULL,
    update_offset    INTEGER NOT NULL,
    update_length    INTEGER NOT NULL,
    update_sha256    BLOB NOT NULL,
    snapshot_offset  INTEGER NOT NULL,
    snapshot_length  INTEGER NOT NULL,
    snapshot_sha256  BLOB NOT NULL,
    PRIMARY KEY (job_id, round, position),
    FOREIGN KEY (job_id, round) REFERENCES outcome
) STRICT;

CREATE TABLE adapter_file (
    job_id  TEXT NOT NULL,
    round   INTEGER NOT NULL,
    name    TEXT NOT NULL,
    sha256  BLOB NOT NULL,
    size    INTEGER NOT NULL,
    PRIMARY KEY (job_id, round, name),
    FOREIGN KEY (job_id, round) REFERENCES outcome
) STRICT;
