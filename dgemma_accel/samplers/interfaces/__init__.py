"""How models are called: what a sampler has to know about a model's `forward`, and the caches it can keep.

An interface opens a session for one batch; the session turns (tokens, block) into the block's logits. The models
themselves stay as they are published:

- `FullSequence`: the whole sequence at every evaluation. LLaDA, BERT-like models of transformers, and Dream
  (`DREAM`: logits shifted right by one position, 4-d attention mask and position ids for padded batches).
- `PrefixCache`, `DualCache`: Fast-dLLM's caches, for its LLaDA and (with `shift_logits=True`) its Dream; the prefix
  cache also for models of transformers that return a cache.
- `BlockCache`: SDAR's block diffusion, for models that accept a cache and `store_kv`.
- `BlockCausal`: LLaDA2's, which reads the blocks so far at every evaluation.
- `HierarchicalCache`: Fast-dLLM v2's, whose blocks are decided in sub-blocks.
- `CausalContext`: Nemotron-Labs-Diffusion's, which reads what is done as an autoregressive model.
"""

from .base import Interface, Session, logits_of, past_of
from .blocks import BlockCache, BlockCausal
from .causal import CausalContext
from .fast_dllm import DualCache, PrefixCache
from .full import DREAM, FullSequence
from .hierarchical import HierarchicalCache

__all__ = [
    "DREAM",
    "BlockCache",
    "BlockCausal",
    "CausalContext",
    "DualCache",
    "FullSequence",
    "HierarchicalCache",
    "Interface",
    "PrefixCache",
    "Session",
    "logits_of",
    "past_of",
]
