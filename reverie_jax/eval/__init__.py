"""Evaluation: decode answers, score them by benchmarks' rules, and report."""
