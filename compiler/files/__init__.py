"""Files and folders: durable writes, digests, the cache, YAML with line numbers."""
