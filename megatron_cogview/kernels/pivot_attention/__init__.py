"""Three-region sparse attention (appendix B of the paper, P-ATT-1..7)."""
