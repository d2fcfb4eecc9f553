"""Campaigns of faults against training: kills, signals, stops, bad numbers, bad disks, bad files."""
