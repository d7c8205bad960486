"""Monte-Carlo tree search over reasoning steps, guided by the reward model.

Source: Hao et al. 2023, arXiv 2305.14992 (RAP), with the reward of whole responses; UCT by Kocsis and Szepesvári 2006.
Rewards are scaled to [0, 1] by the least and the highest of the problem so far (Schrittwieser et al. 2020, MuZero).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from nabla_fast.comparison import is_higher
from nabla_fast.search.base import Draw, Prompt, Response, Search
from nabla_fast.search_config import SearchConfig


@dataclass(eq=False)
class Node:
    """A response up to the end of a step.

    Attributes:
        response: its caches are those of the first complete response through it.
        children: last step → the node behind it, in the order in which they were drawn.
        draws: rollouts that began here.
        visits: simulations that went through it.
        total: sum of their rewards.
    """

    response: Response
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    draws: int = 0
    visits: int = 0
    total: float = 0.0

    @property
    def open(self) -> list[Node]:
        """Children that can be continued; the reward of a complete response is known."""
        return [child for child in self.children.values() if not child.response.finished]


def mcts(prompt: Prompt, n: int, settings: SearchConfig, enough: Callable[[Prompt], bool] | None = None) -> Search:
    """The complete response of the highest reward among those of a tree search's simulations, the first of equals.

    A simulation goes down from the prompt: at a node with ``settings.search_width`` draws it takes the open child of
    the highest UCT, and one with fewer, or without open children, it rolls out to the end of the response. The first
    step of the rollout is the child that is added (drawing a step and then the rest by the same policy is the same),
    and the reward of the whole is added to all nodes on the way. So a simulation costs one rollout and one reward, and
    the first ones are those that Best-of-N draws.

    Args:
        n: simulations.
        enough: asked before every simulation but the first whether the budget is spent; where it is given, ``n`` does
            not count.
    """
    root, rewards = Node(prompt.empty), list[float]()
    best: Response | None = None
    while best is None or not (len(rewards) >= n if enough is None else enough(prompt)):
        path = selected(root, settings, rewards)
        leaf = path[-1]
        leaf.draws += 1
        (response,) = yield [Draw(leaf.response, prompt.seeds(leaf.response.tokens, leaf.draws)[-1])]
        path.append(_child(leaf, response, prompt))
        rewards.append(response.score)
        for node in path:
            node.visits += 1
            node.total += response.score
        if best is None or is_higher(response.score, best.score):
            best = response.bare()
    return best


def selected(root: Node, settings: SearchConfig, rewards: list[float]) -> list[Node]:
    """The nodes from the root to the one that is expanded next; ``rewards`` of all simulations so far scale values."""
    path = [root]
    while path[-1].draws >= settings.search_width and path[-1].open:
        parent = path[-1]
        path.append(max(parent.open, key=lambda child: uct(child, parent, rewards, settings.exploration)))
    return path


def uct(child: Node, parent: Node, rewards: list[float], exploration: float) -> float:
    """The child's mean reward, scaled, and a bonus for few visits: Q + c sqrt(ln N / n)."""
    low, high = min(rewards), max(rewards)
    mean = child.total / child.visits
    value = (mean - low) / (high - low) if high > low else 0.5
    return value + exploration * math.sqrt(math.log(parent.visits) / child.visits)


def _child(leaf: Node, response: Response, prompt: Prompt) -> Node:
    """The node of the first step of ``response`` behind ``leaf``, made if it is new."""
    before = len(leaf.response.tokens)
    step = response.tokens[before:]
    for length in range(1, len(step)):
        if prompt.rule.is_step(step[:length]):
            step = step[:length]
            break
    if step not in leaf.children:
        tokens = response.tokens[: before + len(step)]
        finished = len(tokens) == len(response.tokens)
        # What is complete is never continued, so that its caches can go.
        reached = response.bare() if finished else response
        leaf.children[step] = Node(replace(reached, tokens=tokens, finished=finished, reward=None))
    return leaf.children[step]
