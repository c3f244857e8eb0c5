"""Automatic transformation of a CNN into a Split-CNN.

``trace`` finds the region and ``rules`` its operations, ``layout`` cuts them, ``execute`` and
``autograd`` run them, ``surgery`` gives the model its forward, ``report`` tells beforehand.
"""

from splitkern.split.report import Join, SplitReport, check
from splitkern.split.rules import Obstacle, register_pointwise
from splitkern.split.surgery import config_of, disabled, split_, unsplit_

__all__ = [
    "Join",
    "Obstacle",
    "SplitReport",
    "check",
    "config_of",
    "disabled",
    "register_pointwise",
    "split_",
    "unsplit_",
]
