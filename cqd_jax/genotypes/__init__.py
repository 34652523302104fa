"""What an individual is stored as, and how it becomes a model."""
