"""Shipped test support; nothing else in the package imports it."""
