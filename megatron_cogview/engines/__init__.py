"""Engines: what owns the model, its gradients and its optimizer."""
