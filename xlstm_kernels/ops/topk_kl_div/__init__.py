from .api import XLSTM_RECIPE, topk_kl_div

__all__ = ["XLSTM_RECIPE", "topk_kl_div"]
