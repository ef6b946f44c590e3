-- A file of an adapter that is not kept is looked up by its hash, and made again.

CREATE INDEX adapter_file_by_hash ON adapter_file (sha256);
