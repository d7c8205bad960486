"""Inputs for tests and benchmarks: random arguments in `operators`, tiny models of many families in `models`."""
