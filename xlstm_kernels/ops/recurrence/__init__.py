from .api import lstm, slstm

__all__ = ["lstm", "slstm"]
