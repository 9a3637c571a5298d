"""Layers: parameters, initialisation, and one call into the operations."""

from .lstm import LSTM, LSTMCell
from .slstm import SLSTM

__all__ = ["LSTM", "SLSTM", "LSTMCell"]
