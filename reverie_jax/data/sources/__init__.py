"""Annotation files that the field uses, one file a dataset."""
