"""The transition model of OccFM (Liu, Zhao and Rhinehart, NeurIPS 2025, arXiv 2506.23434) and what surrounds it.

`TransitionModel` is compatible with the released checkpoints; `OccupancyVelocity` is the same network as a velocity
field of this package; `load_transition_weights` reads a released ``.ckpt``.
"""

from mfd_fast.models.occfm.checkpoint import load_transition_weights
from mfd_fast.models.occfm.transition import TransitionModel
from mfd_fast.models.occfm.velocity import OccupancyVelocity

__all__ = ["OccupancyVelocity", "TransitionModel", "load_transition_weights"]
