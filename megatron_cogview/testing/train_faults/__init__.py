"""Campaigns of faults against training: kills, signals, stops, bad numbers, disks and files."""
