"""Layers: parameters, initialisation, and one call into the operations."""
