"""Looks into trained models: what they detect, and where they err."""
