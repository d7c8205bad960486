"""`python -m nabla_fast` is `nabla-fast`."""

from nabla_fast.cli import main

main()
