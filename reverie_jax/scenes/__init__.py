"""Synthetic scenes: images of everyday objects, each with its exact scene graph; no download, key or judge is needed."""
