"""Training loops: batches, steps, checkpoints and logs.  Knows no command line."""
