"""Measurements: each file prints what the README's tables hold."""
