"""The evolution-strategies estimate: factors weighted by fitness, summed over members, no perturbation formed."""

from kernels.es_update.api import serves, update

__all__ = ["serves", "update"]
