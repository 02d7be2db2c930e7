"""Training of teachers and students."""
