from .api import mlstm_step

__all__ = ["mlstm_step"]
