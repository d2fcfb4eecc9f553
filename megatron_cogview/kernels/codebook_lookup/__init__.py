"""Nearest codebook entry without the full distance matrix."""
