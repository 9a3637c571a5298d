from .api import linear_cross_entropy, linear_kl_div, linear_topk_kl_div

__all__ = ["linear_cross_entropy", "linear_kl_div", "linear_topk_kl_div"]
