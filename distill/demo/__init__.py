"""`python -m distill demo`: the whole of it in minutes on a laptop."""
