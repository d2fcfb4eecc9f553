"""Files that survive a kill: atomic writes and digests.  Knows nothing of data or checkpoints."""
