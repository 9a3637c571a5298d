from .api import mlstm, mlstm_combine

__all__ = ["mlstm", "mlstm_combine"]
