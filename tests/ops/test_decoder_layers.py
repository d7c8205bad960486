"""Decoder layers of few tokens as one native call, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from guard_pages import guarded
from test_token_kernels import DTYPES, ROUNDING, norm, random
from torch import Tensor
from torch.nn import functional as F

from nabla_fast.ops import linear, native, token_layers
from nabla_fast.ops.rotary import reference as rotary_reference
from nabla_fast.ops.token_layers import DecoderLayers, decoder_layers

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
D, INNER, SIZE, HEADS, KEY_HEADS = 64, 96, 32, 4, 2
SHAPES = (
    (HEADS * SIZE, D),
    (KEY_HEADS * SIZE, D),
    (KEY_HEADS * SIZE, D),
    (D, HEADS * SIZE),
    (INNER, D),
    (INNER, D),
    (D, INNER),
)


def layers_of(
    count: int, dtype: torch.dtype, *, bias: bool = False, norms: bool = False, activation: str = "silu"
) -> DecoderLayers:
    weights, biases, scales = [], [], []
    for i in range(count):
        for j, shape in enumerate(SHAPES):
            weights.append(guarded(random(*shape, dtype=dtype, seed=10 * i + j) / shape[1] ** 0.5))
            biases.append(random(shape[0], dtype=dtype, seed=10 * i + j) if bias else None)
        outer = [1 + 0.1 * random(D, dtype=dtype, seed=i + n) for n in range(2)]
        scales += [
            *outer,
            *([1 + 0.1 * random(SIZE, dtype=dtype, seed=i + n) for n in range(2)] if norms else [None] * 2),
        ]
    nothing = [None] * len(weights)
    return DecoderLayers(weights, nothing, biases, scales, 0.2, 1e-5, False, 1e-6, norms, activation)


def buffers(count: int, batch: int, columns: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    keys, values = (
        [
            guarded(random(batch, KEY_HEADS, columns, SIZE, dtype=dtype, seed=seed + i), written=True)
            for i in range(count)
        ]
        for seed in (20, 40)
    )
    return keys, values


def exact(
    x: Tensor,
    layers: DecoderLayers,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    keys: list[Tensor],
    values: list[Tensor],
    past: int,
) -> Tensor:
    """In float64, by PyTorch's operators; keys and values are written as well."""
    batch, tokens, _ = x.shape
    for i in range(len(keys)):
        w, b = layers.weights[7 * i : 7 * i + 7], layers.biases[7 * i : 7 * i + 7]
        scale = layers.norms[4 * i : 4 * i + 4]

        def linear_layer(n: int, y: Tensor, w: Any = w, b: Any = b) -> Tensor:
            return F.linear(y, w[n].double(), None if b[n] is None else b[n].double())

        normed = norm(x, scale[0], layers.epsilon, layers.offset)
        heads = [linear_layer(n, normed).view(batch, tokens, -1, SIZE) for n in range(3)]
        for n in range(2):
            if scale[2 + n] is not None:
                heads[n] = norm(heads[n], scale[2 + n], layers.head_epsilon, layers.head_offset)
        q, k, v = (part.transpose(1, 2) for part in heads)
        q, k = rotary_reference(q, k, cos.double(), sin.double())
        keys[i][:, :, past : past + tokens], values[i][:, :, past : past + tokens] = k, v
        read = [part[i][:, :, : past + tokens].repeat_interleave(HEADS // KEY_HEADS, 1) for part in (keys, values)]
        scores = layers.scaling * q @ read[0].transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        mixed = (scores.softmax(-1) @ read[1]).transpose(1, 2).reshape(batch, tokens, -1)
        x = x + linear_layer(3, mixed)
        normed = norm(x, scale[1], layers.epsilon, layers.offset)
        gate = token_layers.ACTIVATIONS[layers.activation](linear_layer(4, normed))
        x = x + linear_layer(6, gate * linear_layer(5, normed))
    return x


def tables(batch: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = (guarded(random(batch, tokens, SIZE, dtype=dtype, seed=i)) for i in (1, 2))
    return cos, sin


def causal(tokens: int, past: int, batch: int = 1) -> Tensor:
    return torch.ones(batch, 1, tokens, past + tokens, dtype=torch.bool).tril(past)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "own"),
    [(1, 1, {}), (1, 4, {"bias": True}), (2, 3, {"norms": True}), (3, 5, {"activation": "gelu_tanh"})],
)
def test_layers_equal_float64(dtype: torch.dtype, batch: int, tokens: int, own: dict[str, Any]) -> None:
    past, columns, count = 6, 6 + tokens + 2, 2
    layers = layers_of(count, dtype, **own)
    x = guarded(random(batch, tokens, D, dtype=dtype))
    cos, sin = tables(batch if tokens == 3 else 1, tokens, dtype)
    mask = None if tokens == 1 else causal(tokens, past, batch)
    if batch > 1 and mask is not None:
        mask[0, ..., :3] = False
    keys, values = buffers(count, batch, columns, dtype)
    wide = [[part.double() for part in parts] for parts in (keys, values)]
    before = x.clone()
    out = decoder_layers(x, layers, cos, sin, None if mask is None else guarded(mask), keys, values, past)
    meant = exact(x.double(), layers, cos, sin, mask, *wide, past)
    assert out.dtype == dtype
    assert torch.equal(x, before)
    # A dozen roundings of a layer's results.
    tolerance = 12 * ROUNDING[dtype]
    assert (out.double() - meant).norm() <= tolerance * meant.norm()
    for ours, theirs in zip((*keys, *values), (*wide[0], *wide[1]), strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
        assert torch.equal(ours[:, :, :past].double(), theirs[:, :, :past])
        assert torch.equal(ours[:, :, past + tokens :].double(), theirs[:, :, past + tokens :])


def test_weights_of_eight_bits_are_the_numbers_they_stand_for() -> None:
    layers = layers_of(2, torch.float32, bias=True)
    rounded = [linear.rounded(weight) for weight in layers.weights]
    rough = replace(layers, weights=[values for values, _ in rounded], scales=[scale for _, scale in rounded])
    meant = replace(layers, weights=[values * scale[:, None] for values, scale in rounded])
    x, (cos, sin) = random(1, 3, D), tables(1, 3, torch.float32)
    outs = []
    for own in (rough, meant, layers):
        keys, values = buffers(2, 1, 8, torch.float32)
        outs.append(decoder_layers(x, own, cos, sin, causal(3, 5), keys, values, 5))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
    apart = float((outs[0] - outs[2]).norm() / outs[2].norm())
    assert 1e-4 < apart < 0.03


def test_a_weight_is_rounded_to_the_nearest_of_its_rows_integers() -> None:
    weight = random(5, 64)
    weight[1] = 0
    weight[2] *= 1e-30
    values, scale = linear.rounded(weight)
    assert values.dtype == torch.int8
    assert values.abs().amax(1).tolist() == [127, 0, 127, 127, 127]
    assert bool(((values * scale[:, None] - weight).abs() <= 0.501 * scale[:, None]).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_in_any_company(dtype: torch.dtype) -> None:
    """Bit for bit: after others or with them, beside other sequences, whatever columns are masked."""
    layers, tokens, past = layers_of(2, dtype), 4, 5
    x, (cos, sin) = random(1, tokens, D, dtype=dtype), tables(1, tokens, dtype)
    keys, values = buffers(2, 1, past + tokens, dtype)
    first = [[part.clone() for part in parts] for parts in (keys, values)]
    together = decoder_layers(x, layers, cos, sin, causal(tokens, past), keys, values, past)
    alone = [
        decoder_layers(x[:, n : n + 1], layers, cos[:, n : n + 1], sin[:, n : n + 1], None, *first, past + n)
        for n in range(tokens)
    ]
    assert torch.equal(torch.cat(alone, dim=1), together)
    assert all(torch.equal(a, b) for a, b in zip((*keys, *values), (*first[0], *first[1]), strict=True))
    # Three columns further on, behind columns of anything, as the second of three sequences.
    wide = [[torch.full((3, KEY_HEADS, past + 3 + tokens, SIZE), 7.0, dtype=dtype) for _ in keys] for _ in range(2)]
    for parts, whole in zip(wide, (keys, values), strict=True):
        for part, own in zip(parts, whole, strict=True):
            part[1, :, 3 : past + 3] = own[0, :, :past]
    mask = causal(tokens, past + 3, 3)
    mask[1, ..., :3] = False
    others = torch.cat([x.flip(1), x, -x])
    beside = decoder_layers(others, layers, cos, sin, mask, *wide, past + 3)
    assert torch.equal(beside[1], together[0])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    layers, x, (cos, sin) = layers_of(1, torch.float32), random(2, 4, D), tables(1, 4, torch.float32)

    def run() -> Tensor:
        keys, values = buffers(1, 2, 9, torch.float32)
        return decoder_layers(x, layers, cos, sin, causal(4, 5), keys, values, 5)

    expected, before = run(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(run(), expected)
    finally:
        torch.set_num_threads(before)


def test_no_layers_and_no_tokens() -> None:
    none = layers_of(0, torch.float32)
    x, (cos, sin) = random(1, 2, D), tables(1, 2, torch.float32)
    assert torch.equal(decoder_layers(x, none, cos, sin, None, [], [], 0), x)
    layers = layers_of(1, torch.float32)
    keys, values = buffers(1, 1, 3, torch.float32)
    assert decoder_layers(x[:, :0], layers, cos[:, :0], sin[:, :0], None, keys, values, 3).shape == (1, 0, D)


def test_what_is_wrong_is_named() -> None:
    layers, x, (cos, sin) = layers_of(1, torch.float32), random(1, 2, D), tables(1, 2, torch.float32)
    keys, values = buffers(1, 1, 6, torch.float32)
    mask = causal(2, 4)

    def weights(place: int, weight: Tensor) -> DecoderLayers:
        return replace(layers, weights=[*layers.weights[:place], weight, *layers.weights[place + 1 :]])

    def norms(place: int, own: Tensor) -> DecoderLayers:
        return replace(layers, norms=[*layers.norms[:place], own, *layers.norms[place + 1 :]])

    w = layers.weights
    usual: dict[str, Any] = {
        "x": x, "layers": layers, "cos": cos, "sin": sin, "mask": mask, "keys": keys, "values": values, "past": 4,
    }  # fmt: skip
    for changes, said in [
        ({"x": x[0]}, "x must have shape"),
        ({"cos": cos[:, :1]}, "cos must have shape"),
        ({"sin": sin[..., :8]}, "sin must have shape"),
        ({"cos": cos.bfloat16()}, "cos and sin must have the dtype of x"),
        ({"keys": []}, "for each of 0 keys"),
        ({"values": []}, "there must be values"),
        ({"layers": replace(layers, biases=[None] * 6)}, "7 weights, scales and biases"),
        ({"layers": replace(layers, activation="relu")}, "silu, gelu or gelu_tanh"),
        ({"past": -1}, "0 or more"),
        ({"past": 5}, "must be bool"),
        ({"past": 5, "mask": None}, "room for 7 columns"),
        ({"mask": mask.float()}, "must be bool"),
        ({"mask": mask[..., 1:]}, "must be bool"),
        ({"mask": mask[0]}, "must be bool"),
        ({"keys": [keys[0][:, :1]]}, "keys must have shape"),
        ({"values": [values[0].half()]}, "values must have the dtype of x"),
        ({"values": [values[0].transpose(2, 3).contiguous().transpose(2, 3)]}, "without gaps in a head"),
        ({"layers": weights(0, w[0][:40])}, "heads of the 32 features"),
        ({"layers": weights(1, w[1][:0])}, "heads of the 32 features"),
        ({"layers": weights(2, w[2][:32])}, r"weights\[2\] must have the shape \(64, 64\)"),
        ({"layers": weights(3, w[3][:32])}, r"weights\[3\] must have the shape \(64, 128\)"),
        ({"layers": weights(5, w[5][:64])}, r"weights\[5\] must have the shape \(96, 64\)"),
        ({"layers": weights(6, w[6][:, :64])}, r"weights\[6\] must have the shape \(64, 96\)"),
        ({"layers": weights(4, w[4].half())}, "weights must have the dtype of x"),
        ({"layers": weights(4, w[4].to(torch.int8))}, "weights must have the dtype of x"),
        ({"layers": replace(layers, weights=[v.to(torch.int8) for v in w])}, "scale must be given"),
        ({"layers": norms(0, torch.ones(8))}, r"norms\[0\] must have shape"),
        ({"layers": norms(1, torch.ones(D).half())}, "norms must have the dtype of x"),
        ({"x": random(1, 17, D), "cos": random(1, 17, SIZE), "sin": random(1, 17, SIZE)}, "at most 16 tokens"),
        ({"x": x.double(), "cos": cos.double(), "sin": sin.double()}, "x must be float32"),
    ]:
        with pytest.raises((RuntimeError, TypeError, ValueError), match=said):
            decoder_layers(**{**usual, **changes})


def test_the_fake_kernel_has_the_real_ones_shape() -> None:
    layers, x, (cos, sin) = layers_of(1, torch.float32), random(1, 2, D), tables(1, 2, torch.float32)
    keys, values = buffers(1, 1, 6, torch.float32)
    settings = (
        layers.scaling,
        layers.epsilon,
        layers.offset,
        layers.head_epsilon,
        layers.head_offset,
        layers.activation,
    )
    given = (x, layers.weights, layers.scales, layers.biases, layers.norms, cos, sin, causal(2, 4), keys, values, 4)
    kernel: Any = torch.ops.nabla_fast.native_decoder_layers
    torch.library.opcheck(kernel, (*given, *settings), test_utils=("test_schema", "test_faketensor"))
