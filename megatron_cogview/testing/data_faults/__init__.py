"""Campaigns against the data path: kills, damaged files, hostile input."""
