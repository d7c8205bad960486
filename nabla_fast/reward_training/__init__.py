"""Training a reward model to judge answers and to point at better tokens: `nabla-fast train-reward`."""
