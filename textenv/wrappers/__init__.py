"""Action-space tools, for one environment and for many."""

from textenv.wrappers.action_mask import ActionMask, VectorActionMask
from textenv.wrappers.top_k import TopKActions, VectorTopKActions

__all__ = ["ActionMask", "TopKActions", "VectorActionMask", "VectorTopKActions"]
