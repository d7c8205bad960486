import dataclasses
import math

import pytest

import nabla_fast as nf


def test_defaults_are_the_published_settings():
    config = nf.NablaConfig()
    assert (config.max_iters, config.learning_rate, config.min_lr_ratio) == (20, 0.01, 0.1)
    assert (config.reward_coeff, config.nll_coeff, config.max_rollouts) == (1.0, 1e-3, 8)
    assert config.rollout == nf.Sampling(temperature=0.6, top_p=0.95, top_k=None)
    assert config.resample == nf.Sampling(temperature=0.5, top_p=0.95)
    assert (config.confidence_threshold, config.gradient_threshold, config.entropy_threshold) == (0.97, 4.0, None)
    assert (config.parameterization, config.anchor, config.update_postfix) == ("latents", "argmax", False)


def test_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        nf.NablaConfig().max_iters = 3


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("max_iters", -1, ValueError),
        ("max_iters", 2.5, TypeError),
        ("max_iters", True, TypeError),
        ("learning_rate", -0.1, ValueError),
        ("learning_rate", math.nan, ValueError),
        ("learning_rate", "fast", TypeError),
        ("min_lr_ratio", 1.5, ValueError),
        ("lr_schedule", "exponential", ValueError),
        ("warmup_iters", 21, ValueError),
        ("tau", 0.0, ValueError),
        ("gumbel_noise", -1.0, ValueError),
        ("reward_coeff", math.inf, ValueError),
        ("parameterization", "embeddings", ValueError),
        ("anchor", "greedy", ValueError),
        ("update_postfix", 1, TypeError),
        ("confidence_threshold", 1.2, ValueError),
        ("confidence_threshold", -0.1, ValueError),
        ("entropy_threshold", -1.0, ValueError),
        ("gradient_threshold", -4.0, ValueError),
        ("max_rollouts", 0, ValueError),
        ("max_new_tokens", 0, ValueError),
        ("stop_strings", "END", TypeError),
        ("stop_strings", ("END", ""), ValueError),
        ("eos_token_ids", (-1,), ValueError),
        ("eos_token_ids", 2, ValueError),
        ("gradient_cache_bytes", -1, ValueError),
        ("backend", "tpu", ValueError),
        ("seed", 1.0, TypeError),
        ("rollout", 0.6, TypeError),
    ],
)
def test_a_bad_value_is_refused_by_name_with_the_value(name, value, error):
    with pytest.raises(error, match=name) as raised:
        nf.NablaConfig(**{name: value})
    assert repr(value) in str(raised.value) or str(value) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.1), ("top_k", 0), ("temperature", math.inf)],
)
def test_a_bad_sampling_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        nf.Sampling(**{name: value})


def test_replace_validates_and_lists_known_names():
    assert nf.NablaConfig().replace(seed=3).seed == 3
    with pytest.raises(ValueError, match="tau"):
        nf.NablaConfig().replace(tau=-1.0)
    with pytest.raises(TypeError, match=r"max_iterations.*max_iters"):
        nf.NablaConfig().replace(max_iterations=3)


def test_lists_are_accepted_and_frozen():
    config = nf.NablaConfig(stop_strings=["END"], eos_token_ids=[1, 2])
    assert config.stop_strings == ("END",)
    assert config.eos_token_ids == (1, 2)
