"""Layers: parameters, initialisation, and one call into the operations."""

from .block import XLSTMBlock
from .lstm import LSTM, LSTMCell
from .mlstm import MLSTM, GateProjection
from .slstm import SLSTM

__all__ = ["LSTM", "MLSTM", "SLSTM", "GateProjection", "LSTMCell", "XLSTMBlock"]
