from .api import mlstm, mlstm_combine, mlstm_context_parallel

__all__ = ["mlstm", "mlstm_combine", "mlstm_context_parallel"]
