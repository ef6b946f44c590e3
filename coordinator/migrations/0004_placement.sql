-- What placement knows of nodes, and pipelines formed in place of lost ones.

-- Seconds a token and block, as the node measured it; 0: it did not say.
ALTER TABLE node ADD COLUMN token_block_s REAL NOT NULL DEFAULT 0.0;
-- 1: formed within a round, of the survivors of a pipeline that lost a node.
ALTER TABLE pipeline ADD COLUMN repair INTEGER NOT NULL DEFAULT 0;
