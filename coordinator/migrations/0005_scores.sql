-- Held-out evaluation: who scores a committed round, what came out, and the best so far.

-- The pipeline whose lead scores; NULL: none does now.
ALTER TABLE round ADD COLUMN scorer INTEGER;
ALTER TABLE round ADD COLUMN eval_loss REAL;
ALTER TABLE round ADD COLUMN eval_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE job ADD COLUMN best_round INTEGER;
ALTER TABLE job ADD COLUMN best_loss REAL;
-- Evaluations since the best one.
ALTER TABLE job ADD COLUMN stale INTEGER NOT NULL DEFAULT 0;
-- The held-out file; empty: none.
ALTER TABLE job ADD COLUMN heldout BLOB NOT NULL DEFAULT x'';
ALTER TABLE job ADD COLUMN heldout_size INTEGER NOT NULL DEFAULT 0;
ALTER TABLE job ADD COLUMN heldout_samples INTEGER NOT NULL DEFAULT 0;
