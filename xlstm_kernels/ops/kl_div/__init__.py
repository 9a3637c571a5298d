from .api import kl_div

__all__ = ["kl_div"]
