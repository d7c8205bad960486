import dataclasses
import math

import pytest

import nabla_fast as nf

# What the scripts for MATH-500 set, and the published code's own defaults for the rest.
MATH500 = {
    "max_iters": 20,
    "learning_rate": 0.01,
    "min_lr_ratio": 0.1,
    "lr_schedule": "cosine",
    "warmup_iters": 0,
    "weight_decay": 0.0,
    "tau": 1.0,
    "gumbel_noise": 0.0,
    "reward_coeff": 1.0,
    "nll_coeff": 1e-3,
    "parameterization": "logits",
    "anchor": "argmax",
    "update_postfix": False,
    "confidence_threshold": 0.97,
    "entropy_threshold": None,
    "gradient_threshold": 4.0,
    "max_rollouts": 8,
    "rejection_sampling": True,
    "max_new_tokens": 1024,
    "rollout": nf.Sampling(temperature=0.6, top_p=0.95, top_k=None),
    "resample": nf.Sampling(temperature=0.5, top_p=0.95, top_k=None),
}
PUBLISHED = {
    "math500": MATH500,
    "aime": MATH500 | {"gradient_threshold": 8.0, "max_new_tokens": 3072},
    "amc": MATH500
    | {
        "parameterization": "latents",
        "rollout": nf.Sampling(temperature=0.7, top_p=0.8, top_k=20),
        "resample": nf.Sampling(temperature=0.5, top_p=0.8, top_k=20),
    },
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_the_published_settings(preset):
    config = nf.NablaConfig.published(preset)
    assert {name: getattr(config, name) for name in MATH500} == PUBLISHED[preset]


def test_defaults_are_the_published_settings_but_for_anchor_and_parameterization():
    changed = {"anchor": "rollout", "parameterization": "latents"}
    assert nf.NablaConfig() == nf.NablaConfig.published("math500", **changed)


def test_a_preset_can_be_changed_by_keyword():
    config = nf.NablaConfig.published("aime", seed=3, gradient_threshold=None)
    assert (config.seed, config.gradient_threshold, config.max_new_tokens) == (3, None, 3072)
    with pytest.raises(TypeError, match=r"max_iterations.*max_iters"):
        nf.NablaConfig.published("aime", max_iterations=3)
    with pytest.raises(ValueError, match="tau"):
        nf.NablaConfig.published("aime", tau=-1.0)


@pytest.mark.parametrize("preset", ["gsm8k", "MATH500", None])
def test_an_unknown_preset_is_refused_with_the_choices(preset):
    with pytest.raises(ValueError, match="preset must be one of math500, aime, amc") as raised:
        nf.NablaConfig.published(preset)
    assert repr(preset) in str(raised.value)


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
        ("gradient_cache_bytes", 2**63, ValueError),
        ("vllm_timeout", 0.0, ValueError),
        ("vllm_timeout", 1e300, ValueError),
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
    [
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", 0),
        ("temperature", math.inf),
        ("temperature", 1e-300),
    ],
)
def test_a_bad_sampling_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        nf.Sampling(**{name: value})


def test_what_is_not_finite_is_told_so():
    with pytest.raises(ValueError, match="learning_rate must be at least 0 and finite, got inf"):
        nf.NablaConfig(learning_rate=math.inf)


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
