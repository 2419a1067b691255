"""Clients of hosted models: providers, journal, limits, batches."""
