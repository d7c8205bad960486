"""Attention implementations: any that transformers takes, and the masks of flash attention.

flash-attn needs a GPU. Here a few lines of PyTorch take the place of its two functions; what transformers does before
and after them, dropping padding by the 2-D mask and putting it back, is its own code.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import test_decoder
import torch
import transformers
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

import nabla_fast as nf
from nabla_fast.generate import make_pair
from nabla_fast.models import loading
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.objective import Objective, Request
from nabla_fast.testing.models import save_pair

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = test_decoder.PROMPTS
CONFIG = test_decoder.BASE
CALLS: Counter[str] = Counter()


def counted(*args: Any, **kwargs: Any) -> Any:
    CALLS["counted"] += 1
    return sdpa_attention_forward(*args, **kwargs)


AttentionInterface.register("counted", counted)
AttentionMaskInterface.register("counted", sdpa_mask)
AttentionInterface.register("emulated_flash", flash_attention_forward)
AttentionMaskInterface.register("emulated_flash", flash_attention_mask)


def one(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    """Attention of one sequence, (S, heads, d) over (T, heads, d): the last query sees all keys."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("shd,thd->hst", q, k) * scale
    behind = torch.arange(len(k) - len(q), len(k)).unsqueeze(1) - torch.arange(len(k))
    hidden = (behind < 0) if causal else torch.zeros_like(behind, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (behind > window)
    return torch.einsum("hst,thd->shd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def flash_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    CALLS["without padding"] += 1
    window = None if window_size[0] < 0 else window_size[0]
    scale = softmax_scale or q.shape[-1] ** -0.5
    return torch.stack([one(*row, scale, causal, window) for row in zip(q, k, v, strict=True)])


def varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    CALLS["padded"] += 1
    window = None if window_size[0] < 0 else window_size[0]
    scale = softmax_scale or q.shape[-1] ** -0.5
    ends = zip(cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist()[1:], strict=True)
    starts = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    rows = [
        one(q[a:c], k[b:d], v[b:d], scale, causal, window)
        for (a, b), (c, d) in zip(list(starts)[:-1], ends, strict=True)
    ]
    return torch.cat(rows)


@pytest.fixture
def emulated_flash(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an attention that is flash attention but for its two kernels."""
    functions = {"_flash_fn": flash_func, "_flash_varlen_fn": varlen_func, "_loaded_implementation": "emulated_flash"}
    functions |= {"_pad_fn": flash._pad_input, "_unpad_fn": flash._unpad_input}
    functions |= {"_process_flash_kwargs_fn": flash._lazy_define_process_function(varlen_func)}
    for name, value in functions.items():
        monkeypatch.setattr(flash, name, value)
    return "emulated_flash"


def loaded(tmp_path: Path, attention: str, family: str = "llama") -> tuple[Any, ...]:
    folders = save_pair(tmp_path / family, family)
    how = {"device": "cpu", "dtype": "float32", "attn_implementation": attention}
    return *loading.load_language_model(folders[0], **how), *loading.load_reward_model(folders[1], **how)


def evaluations(models: tuple[Any, ...]) -> list[Any]:
    """Gradients of responses of different lengths behind prompts of different lengths, twice: the second time they are
    continued behind the caches of the first."""
    config = CONFIG.replace(gradient_cache=False)
    pair = make_pair(*models, config)
    sequences = pair.sequences(*pair.prompts([[{"role": "user", "content": p}] for p in PROMPTS], config), config)
    objective = Objective(pair.language_model, pair.reward_model, config)
    generator = torch.Generator().manual_seed(0)
    found = []
    for starts in ((0, 2, 1, 0), (3, 2, 4, 1)):
        responses = [torch.randint(5, 40, (6 + i,), generator=generator) for i in range(len(sequences))]
        found += objective.evaluate([Request(*x) for x in zip(sequences, responses, starts, strict=True)])
    return found


def require_same_gradients(models: tuple[Any, ...], others: tuple[Any, ...]) -> None:
    for ours, theirs in zip(evaluations(models), evaluations(others), strict=True):
        assert ours.reward == pytest.approx(theirs.reward, abs=1e-3)
        torch.testing.assert_close(ours.log_likelihoods, theirs.log_likelihoods, rtol=1e-3, atol=1e-3)
        for mine, other in zip(ours.factors, theirs.factors, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def tokens(models: tuple[Any, ...]) -> list[list[int]]:
    return [x.tolist() for x in nf.generate(*models, PROMPTS, CONFIG).sequences]


def test_a_registered_attention_is_used_by_both_models_and_gives_what_sdpa_does(tmp_path: Path) -> None:
    own, sdpa = loaded(tmp_path, "counted"), loaded(tmp_path, "sdpa")
    assert all(own[i].config._attn_implementation == "counted" for i in (0, 2))
    for i in (0, 2):
        CALLS.clear()
        own[i](input_ids=torch.tensor([[5, 6, 7]]))
        assert CALLS["counted"] == own[i].config.num_hidden_layers
    require_same_gradients(own, sdpa)
    CALLS.clear()
    assert tokens(own) == tokens(sdpa)
    assert CALLS["counted"] > 0


# gemma3 has layers with a window, which counts tokens here and columns in SDPA's masks.
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_flash_attention_sees_no_padding_and_gives_what_sdpa_does(
    family: str, tmp_path: Path, emulated_flash: str
) -> None:
    own, sdpa = loaded(tmp_path, emulated_flash, family), loaded(tmp_path, "sdpa", family)
    backbone = LanguageModel(*own[:2]).backbone
    assert backbone.cache_kind == "prefix"
    # Columns of drafts that were wrong are gaps, which are no padding on one side: they were tried, too.
    assert backbone.windowed == (family == "gemma3")
    CALLS.clear()
    require_same_gradients(own, sdpa)
    assert CALLS["padded"] > 0
    CALLS.clear()
    assert tokens(own) == tokens(sdpa)
    assert CALLS["padded"] > 0
    assert CALLS["without padding"] > 0


@pytest.mark.parametrize("name", ["kernels-community/flash-attn3", "kernels-community/flash-attn2@main", "counted"])
def test_the_name_reaches_transformers_for_both_models(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, given = save_pair(tmp_path), []

    def from_pretrained(_: str, *, attn_implementation: str, **__: Any) -> Any:
        given.append(attn_implementation)
        return torch.nn.Linear(1, 1), {"missing_keys": []}

    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification):
        monkeypatch.setattr(auto_class, "from_pretrained", from_pretrained)
    loading.load_language_model(folders[0], device="cpu", dtype="float32", attn_implementation=name)
    loading.load_reward_model(folders[1], device="cpu", dtype="float32", attn_implementation=name)
    assert given == [name, name]


@pytest.mark.parametrize(
    ("name", "needs"),
    [("kernels-community/flash-attn3", "kernels"), ("flash_attention_2", "FlashAttention2")],
)
def test_a_package_that_an_attention_needs_is_named_with_the_argument(name: str, needs: str, tmp_path: Path) -> None:
    if any(importlib.util.find_spec(package) for package in ("kernels", "flash_attn")):
        pytest.skip("kernels or flash-attn is installed")
    folders = save_pair(tmp_path)
    for load, folder in zip((loading.load_language_model, loading.load_reward_model), folders, strict=True):
        with pytest.raises(ImportError) as caught:
            load(folder, device="cpu", attn_implementation=name)
        message = str(caught.value)
        assert message.startswith(f"attn_implementation is {name!r}, with which transformers does not load {folder} (")
        assert needs in message
        assert "\n" not in message


def test_an_attention_that_the_model_does_not_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_supports_flex_attn", False)
    folder, _ = save_pair(tmp_path)
    with pytest.raises(ValueError, match="attn_implementation is 'flex_attention', with which transformers does not"):
        loading.load_language_model(folder, device="cpu", dtype="float32", attn_implementation="flex_attention")


def test_a_damaged_checkpoint_is_not_blamed_on_the_attention(tmp_path: Path) -> None:
    folder, _ = save_pair(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ValueError, match=r"its config\.json and its weights are of different sizes") as caught:
        loading.load_language_model(folder, device="cpu", dtype="float32", attn_implementation="counted")
    assert "attn_implementation" not in str(caught.value)


@pytest.mark.parametrize("name", ["flash", "a/b/c", "owner/", "/kernel", "kernels-community/ flash"])
def test_an_unknown_name_is_refused_before_anything_is_loaded(name: str) -> None:
    with pytest.raises(ValueError, match=f"attn_implementation is {name!r}; use one of auto, .*counted.* or a kernel"):
        loading.choose_attention(name, torch.device("cpu"), torch.float32)
