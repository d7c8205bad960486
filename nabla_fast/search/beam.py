"""Beam search over reasoning steps, guided by the reward model.

Source: Snell et al. 2024, arXiv 2408.03314, section 5.1 ("beam search with a PRM"); here the reward model of the pair
scores a partial response, read at its last token.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import count

from nabla_fast.comparison import highest, ranked
from nabla_fast.sampling import sequence_seeds
from nabla_fast.search.base import Draw, Prompt, Response, Search
from nabla_fast.search_config import SearchConfig


def shape(n: int, settings: SearchConfig) -> tuple[int, int]:
    """Beams, and continuations of each, for ``n`` candidates a step.

    As published, n // M beams with M = ``settings.search_width``; for n below M one beam of n. Where n is no multiple
    of the beams, a few candidates fewer.
    """
    beams = max(1, n // settings.search_width)
    return beams, n // beams


def beam_search(
    prompt: Prompt, n: int, settings: SearchConfig, enough: Callable[[Prompt], bool] | None = None
) -> Search:
    """The complete response of the highest reward that a beam search finds, the first of equals.

    The first step draws all candidates from the prompt. Of the candidates of a step, and the kept responses that are
    complete already, the best ``beams`` by reward are kept, equal ones once; it ends when all that are kept are
    complete. Complete responses that were not kept may still be the answer.

    Args:
        n: candidates a step, see `shape`.
        enough: asked before every step whether the budget is spent. While it is not, a search that has ended is
            followed by another one with other noise; when it is, and no response is complete, the best partial one is
            drawn to its end. None runs one search.
    """
    beams, width = shape(n, settings)
    complete: list[Response] = []
    kept = [prompt.empty]
    for number in count() if enough else range(1):
        seed = sequence_seeds(prompt.sequence.seed, [(number,)])[0] if number else prompt.sequence.seed
        kept = [prompt.empty]
        while (open_ := [one for one in kept if not one.finished]) and not (enough and enough(prompt)):
            each = beams * width if open_ == [prompt.empty] else width
            drawn = yield [Draw(one, own) for one in open_ for own in prompt.seeds(one.tokens, each, seed)]
            ended = [one.bare() for one in drawn if one.finished]
            complete += ended
            kept = _best(
                [*(one for one in kept if one.finished), *ended, *(one for one in drawn if not one.finished)], beams
            )
        if enough and enough(prompt):
            break
    if not complete:
        best = kept[0]
        while not best.finished:
            (best,) = yield [Draw(best, prompt.seeds(best.tokens, 1)[0], scored=False)]
        complete.append(best)
    return complete[highest([one.score for one in complete])]


def _best(responses: Seq[Response], most: int) -> list[Response]:
    """Those of the highest rewards, the best first, of equals the earlier; the same response once."""
    distinct = {one.tokens: one for one in reversed(responses)}
    first = [one for one in responses if distinct[one.tokens] is one]
    return [first[i] for i in ranked([one.score for one in first], most)]
