"""Measurements of one GPU: what ``tools/gpu_check.sh`` runs.  Knows no command line."""
