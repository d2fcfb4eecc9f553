"""Tests of single modules; the folder mirrors the package."""
