"""Loss surfaces and ensembles: the geometry of Izmailov et al., UAI 2018, for runs of the trainer
(``swa-fast analyze``) and for any network (:class:`Problem`)."""

from .geometry import Plane, combine, directions, distances
from .measure import Cache, Problem, Value
from .studies import Study, distances_of, ensemble, plane, rays, segment, trajectory

__all__ = [
    "Cache",
    "Plane",
    "Problem",
    "Study",
    "Value",
    "combine",
    "directions",
    "distances",
    "distances_of",
    "ensemble",
    "plane",
    "rays",
    "segment",
    "trajectory",
]
