"""Reward-guided searches over reasoning steps, to compare with: beam search and Monte-Carlo tree search."""

from nabla_fast.search.base import Prompt, Response, Search, run
from nabla_fast.search.beam import beam_search
from nabla_fast.search.mcts import mcts

__all__ = ["Prompt", "Response", "Search", "beam_search", "mcts", "run"]
