"""The evolution-strategies estimate: factors weighted by fitness, summed over members, no perturbation formed."""

from kernels.es_update.api import update

__all__ = ["update"]
