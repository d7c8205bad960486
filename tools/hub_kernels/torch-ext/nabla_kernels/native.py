"""What `registry` asks of a library in C++, of which these kernels have none."""


def define(schema: str) -> None:
    """Defines nothing: `backends.resolve` never answers "native"."""
