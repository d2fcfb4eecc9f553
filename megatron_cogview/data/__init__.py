"""From image-text pairs to token shards, and from token shards to batches."""
