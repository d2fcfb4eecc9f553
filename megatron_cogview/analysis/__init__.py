"""Studies of trained models and of their parts."""
