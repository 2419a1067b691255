"""Review of annotation files in a browser: samples with their images, marks of reviewers, and their agreement."""
