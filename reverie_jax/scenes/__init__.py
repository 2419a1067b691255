"""The embedded world: pictures of everyday things, each with its exact scene graph."""
