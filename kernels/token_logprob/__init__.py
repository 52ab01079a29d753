"""Log-probabilities of given tokens and entropies from hidden states, without logits of the whole sequence."""

from kernels.token_logprob.api import log_prob, serves

__all__ = ["log_prob", "serves"]
