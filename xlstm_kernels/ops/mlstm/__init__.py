from .api import mlstm

__all__ = ["mlstm"]
