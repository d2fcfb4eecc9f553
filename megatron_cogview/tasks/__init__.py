"""Wiring: one file per task, each joining the layers below for one command."""
