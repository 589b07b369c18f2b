"""Numbers: from texts to a checkpoint that can be submitted."""
