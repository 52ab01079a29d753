"""Attention of one new token to what is in the cache."""

from kernels.decode_attention.api import attend

__all__ = ["attend"]
