"""Inputs for tests and benchmarks: random operands in `operators`, tiny models of many families in `models`."""
