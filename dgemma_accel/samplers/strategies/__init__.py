"""The strategies, by family."""

from .base import BlockState, EveryStep, Step, Strategy, as_strategy, even_count
from .dgemma import EntropyBoundRenoise
from .dinfer import CreditThreshold, DInferThreshold, Hierarchy, HierarchyWithRemask, MinimalTopK
from .dream import Entropy, MaskgitPlus, Origin, TopkMargin
from .llada import LowConfidence, LowConfidenceDynamic, SequentialWindow
from .sglang import JointThresholdEdit, SGLangLowConfidence

__all__ = [
    "BlockState",
    "CreditThreshold",
    "DInferThreshold",
    "Entropy",
    "EntropyBoundRenoise",
    "EveryStep",
    "Hierarchy",
    "HierarchyWithRemask",
    "JointThresholdEdit",
    "LowConfidence",
    "LowConfidenceDynamic",
    "MaskgitPlus",
    "MinimalTopK",
    "Origin",
    "SGLangLowConfidence",
    "SequentialWindow",
    "Step",
    "Strategy",
    "TopkMargin",
    "as_strategy",
    "even_count",
]
