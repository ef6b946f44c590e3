-- Inner steps that a contribution's pipeline dropped, since their loss or gradient was not finite.

ALTER TABLE contribution ADD COLUMN skipped_steps INTEGER NOT NULL DEFAULT 0;
