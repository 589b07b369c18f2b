"""Models: what a checkpoint is, how it is fetched, and how its tokenizer reads text."""
