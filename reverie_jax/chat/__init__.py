"""A talk with a model, or with several side by side: its state, its terminal, its page, and feedback as preference pairs."""
