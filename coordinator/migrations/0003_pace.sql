-- Rounds on volunteers' time: what pipelines took, rounds that ask for an early end, and what was trained.

-- Seconds from forming to whole, scaled to all inner steps; NULL: not whole, or a restart lay between.
ALTER TABLE pipeline ADD COLUMN took_s REAL;
-- 1: pipelines may contribute fewer inner steps than the job file says.
ALTER TABLE round ADD COLUMN wrap_up INTEGER NOT NULL DEFAULT 0;
-- Tokens that carried loss; 0: its node does not say.
ALTER TABLE contribution ADD COLUMN label_tokens INTEGER NOT NULL DEFAULT 0;
