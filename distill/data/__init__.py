"""Text as tokens, and a teacher's words about it, on disk."""
