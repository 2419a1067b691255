"""The Hugging Face hub: repositories to read from and to write to, cards, datasets."""
