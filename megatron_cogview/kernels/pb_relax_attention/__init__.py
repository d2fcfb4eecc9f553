"""PB-relax attention (P-STAB-6, Eq. 4 of the paper)."""
