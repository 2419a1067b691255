"""Memory and speed of a training step, planned without the machine."""
