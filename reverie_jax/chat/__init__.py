"""Chat with a model, or with several side by side: sessions, terminal, page, and feedback as preference pairs."""
