"""Rules and writes of `commit`, the named strategies built on them, and the sampler that runs a strategy.

A rule (`Threshold(0.9)`) says which positions one `commit` takes. A strategy (`LowConfidence()`) is a published
algorithm: it gives a rule for every step. `MaskedDiffusionSampler` takes either. docs/samplers.md lists them all.
"""

from . import interfaces
from .canvas import CanvasState, StableAndConfident
from .encoding import Measure
from .generation import GenerateResult
from .interfaces import (
    DREAM,
    BlockCache,
    BlockCausal,
    CausalContext,
    DualCache,
    FullSequence,
    HierarchicalCache,
    PrefixCache,
)
from .masked import MaskedDiffusionSampler
from .proposals import Proposal
from .rules import (
    Bernoulli,
    Edit,
    EntropyBound,
    EntropyThreshold,
    Factor,
    Margin,
    Random,
    Rule,
    RunBest,
    Sequential,
    Threshold,
    TopK,
)
from .speculation import SelfSpeculation
from .strategies import (
    BlockState,
    CreditThreshold,
    DInferThreshold,
    Entropy,
    EntropyBoundRenoise,
    Hierarchy,
    HierarchyWithRemask,
    JointThresholdEdit,
    LowConfidence,
    LowConfidenceDynamic,
    MaskgitPlus,
    MinimalTopK,
    Origin,
    SequentialWindow,
    SGLangLowConfidence,
    Step,
    Strategy,
    TopkMargin,
)
from .writes import Keep, Remask, Renoise

__all__ = [
    "DREAM",
    "Bernoulli",
    "BlockCache",
    "BlockCausal",
    "BlockState",
    "CanvasState",
    "CausalContext",
    "CreditThreshold",
    "DInferThreshold",
    "DualCache",
    "Edit",
    "Entropy",
    "EntropyBound",
    "EntropyBoundRenoise",
    "EntropyThreshold",
    "Factor",
    "FullSequence",
    "GenerateResult",
    "HierarchicalCache",
    "Hierarchy",
    "HierarchyWithRemask",
    "JointThresholdEdit",
    "Keep",
    "LowConfidence",
    "LowConfidenceDynamic",
    "Margin",
    "MaskedDiffusionSampler",
    "MaskgitPlus",
    "Measure",
    "MinimalTopK",
    "Origin",
    "PrefixCache",
    "Proposal",
    "Random",
    "Remask",
    "Renoise",
    "Rule",
    "RunBest",
    "SGLangLowConfidence",
    "SelfSpeculation",
    "Sequential",
    "SequentialWindow",
    "StableAndConfident",
    "Step",
    "Strategy",
    "Threshold",
    "TopK",
    "TopkMargin",
    "interfaces",
]
