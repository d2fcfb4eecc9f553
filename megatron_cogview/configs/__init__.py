"""Plain values: what a run is made of.  Standard library only; no torch, no files but JSON."""
