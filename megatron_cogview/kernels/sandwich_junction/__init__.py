"""End of a Sandwich-LN branch and start of the next one, in one pass (P-STAB-8, P-STAB-9)."""
