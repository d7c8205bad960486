"""What blocks change in a model for a while, where blocks of several threads overlap."""

from __future__ import annotations

import threading

import pytest
import torch

from nabla_fast.models.decoder_layers import checkpointed
from nabla_fast.models.temporary import frozen
from nabla_fast.testing.models import tiny_language_model


def overlapping(first, second):
    """Enters ``first`` here and ``second`` in another thread, then leaves ``first`` before ``second``."""
    entered, leave = threading.Event(), threading.Event()

    def other():
        with second():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with first():
        thread.start()
        assert entered.wait(10)
    yield
    leave.set()
    thread.join(10)
    assert not thread.is_alive()


def test_parameters_stay_frozen_until_the_last_block_of_any_thread_ends():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)

    def block():
        return frozen(model.parameters())

    for _ in overlapping(block, block):
        assert not model.weight.requires_grad
    assert model.weight.requires_grad
    assert not model.bias.requires_grad


def test_layers_get_their_own_forward_back_when_the_last_block_of_any_thread_ends():
    model = tiny_language_model("llama")
    layers = model.model.layers

    def block():
        return checkpointed(model)

    for _ in overlapping(block, block):
        assert all("forward" in vars(layer) for layer in layers)
    assert not any("forward" in vars(layer) for layer in layers)


def test_an_error_ends_a_block():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(KeyError), frozen(model.parameters()):
        raise KeyError
    assert model.weight.requires_grad
