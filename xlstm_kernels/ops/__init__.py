"""One folder an operation: api.py (public), op.py (schema, fake, table), reference.py, backends."""
