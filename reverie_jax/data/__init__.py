"""From annotation files to batches: formats, records, trees, sequences."""
