"""What a student is trained on, within one module."""
