"""PB-relax LayerNorm: ``LN(x) = LN(x / max|x|)`` (P-STAB-3)."""
