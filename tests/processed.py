"""A sampler with logits processors of a test's own."""

from nabla_fast.sampling import Processors, Sampler


class Processed(Sampler):
    """Applies the same processors to every sequence."""

    names = ("own",)
    repetition_penalty = None

    def __init__(self, before=(), after=()):
        self.given = Processors(before, (), after)

    def processors(self, sequence):
        return self.given
