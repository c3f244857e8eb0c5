"""splitkern: Split-CNN training for convolutional networks whose activations do not fit the GPU.

>>> import splitkern as sk
>>> model = sk.split_(model, images, grid=(2, 2), until="layer2", norm="patch", recompute=True)
"""

from splitkern import geometry, ops, reference
from splitkern._library import BuildInfo, build_info
from splitkern._version import __version__
from splitkern.memory.compile import BudgetError, CompiledPlan, compile, uncompile_
from splitkern.memory.step_report import StepReport, step_report
from splitkern.split import SplitReport, check, config_of, disabled, split_, unsplit_

__all__ = [
    "BudgetError",
    "BuildInfo",
    "CompiledPlan",
    "SplitReport",
    "StepReport",
    "__version__",
    "build_info",
    "check",
    "compile",
    "config_of",
    "disabled",
    "geometry",
    "ops",
    "reference",
    "split_",
    "step_report",
    "uncompile_",
    "unsplit_",
]
