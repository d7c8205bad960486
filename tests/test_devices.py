"""Models on several devices: the same answers, and no operation that mixes devices.

There is no second device here, so `pretended_devices` tells tensors apart and computes on the CPU. Hooks and
off-loading are accelerate's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import accelerate.hooks
import pytest
import test_decoder
import torch
from accelerate import dispatch_model
from pretended_devices import PretendedDevices
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import nabla_fast as nf
from nabla_fast import baselines
from nabla_fast.models import static
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.testing.models import WIDTH, tiny_language_model, tiny_reward_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = test_decoder.PROMPTS[:2]
# Each operation is looked at, which takes longer than to compute it. CUDA graphs need a GPU.
CONFIG = test_decoder.BASE.replace(
    backend="reference", graphs=False, gradient_threshold=0.2, max_new_tokens=8, max_rollouts=4
)
LANGUAGE, REWARD = "cuda:0", "cuda:1"
LAYERS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm")


class Stream:
    """Stands for ``torch.cuda.Stream``, and writes down who waits for whom."""

    def __init__(self, device: Any) -> None:
        self.device = torch.device(device)
        self.waits: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)


class Streams:
    """Stands for the streams of ``torch.cuda``."""

    def __init__(self) -> None:
        self.made: list[Stream] = []
        self.entered: list[Stream] = []
        self.recorded: list[tuple[torch.device, Stream]] = []
        self._current: dict[torch.device, Stream] = {}

    def stream(self, device: Any) -> Stream:
        self.made.append(Stream(device))
        return self.made[-1]

    def current(self, device: Any = None) -> Stream:
        return self._current.setdefault(torch.device(device), Stream(device))

    @contextmanager
    def entering(self, stream: Stream) -> Iterator[None]:
        self.entered.append(stream)
        yield


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    fake = Streams()
    monkeypatch.setattr(torch.cuda, "Stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", fake.current)
    monkeypatch.setattr(torch.cuda, "stream", fake.entering)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: fake.recorded.append((x.device, stream)))
    return fake


@pytest.fixture
def devices(streams: Streams) -> PretendedDevices:
    return PretendedDevices()


def pair(family: str = "llama", reward_family: str = "qwen3", *, tied: bool = True, shuffle: int | None = None) -> Any:
    tokenizer, own = tiny_tokenizer(), tiny_tokenizer(shuffle=shuffle)
    return tiny_language_model(family, tied=tied), tokenizer, tiny_reward_model(reward_family), own


def split(devices: PretendedDevices, model: nn.Module, places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``dispatch_model`` does with a ``device_map``; its check that the devices are there is left out."""

    def put(module: nn.Module, name: str, device: Any, **_: Any) -> None:
        devices.put({**dict(module.named_parameters()), **dict(module.named_buffers())}[name], device)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", put)
    accelerate.hooks.attach_align_device_hook_on_blocks(
        model,
        execution_device={name: torch.device(place) for name, place in places.items()},
        offload=dict.fromkeys(places, False),
        skip_keys=model._skip_keys_device_placement,
    )


def require_same(one: nf.NablaOutput, other: nf.NablaOutput) -> None:
    assert [x.tolist() for x in one.sequences] == [x.tolist() for x in other.sequences]
    assert one.rewards == pytest.approx(other.rewards, abs=1e-9)
    assert one.stats.totals.revisions
    # Drafts that fill a pass differ: more tokens take the time of one on a GPU.
    names = ("rollouts", "gradient_evaluations", "dto_iterations", "reward_calls")
    assert all(getattr(one.stats.totals, name) == getattr(other.stats.totals, name) for name in names)


def decoded_apart(models: Any, devices: PretendedDevices, config: nf.NablaConfig = CONFIG) -> nf.NablaOutput:
    """A decode with each model on a device of its own."""
    devices.put_module(models[0], LANGUAGE)
    devices.put_module(models[2], REWARD)
    with devices:
        return nf.generate(*models, PROMPTS, config)


VARIANTS = [
    {"parameterization": "logits", "anchor": "argmax", "checkpoint_activations": True},
    {"update_postfix": True, "max_iters": 2},
    {"gradient_cache": False, "draft_tokens": 0, "max_batch_size": 1},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_two_models_on_two_devices_decode_what_they_decode_on_one(
    variant: dict[str, Any], devices: PretendedDevices
) -> None:
    models = pair()
    config = CONFIG.replace(**variant)
    expected = nf.generate(*models, PROMPTS, config)
    output = decoded_apart(models, devices, config)
    require_same(output, expected)
    assert all(x.device == torch.device("cpu") for x in output.sequences)
    assert devices.operations[LANGUAGE] > 0
    assert devices.operations[REWARD] > 0


def test_of_the_reward_model_its_table_once_and_gradients_move_and_of_the_language_model_nothing(
    devices: PretendedDevices,
) -> None:
    models = pair()
    output = decoded_apart(models, devices)
    evaluations = output.stats.totals.gradient_evaluations
    moved = devices.copies[REWARD, LANGUAGE] - len(models[1]) * WIDTH
    # Per evaluation a reward, and of each token ahead one row.
    assert evaluations > len(PROMPTS)
    assert (moved - evaluations) % WIDTH == 0
    assert 0 < moved - evaluations <= evaluations * CONFIG.max_new_tokens * WIDTH
    assert devices.copies[LANGUAGE, REWARD] == 0


@pytest.mark.parametrize(
    ("family", "reward_family", "shuffle"),
    [("gemma2", "gpt2", None), ("gpt_neox", "gemma3", None), ("llama", "qwen3", 3)],
)
def test_families_and_vocabularies_on_two_devices(
    family: str, reward_family: str, shuffle: int | None, devices: PretendedDevices
) -> None:
    models = pair(family, reward_family, shuffle=shuffle)
    expected = nf.generate(*models, PROMPTS, CONFIG)
    output = decoded_apart(models, devices)
    require_same(output, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_models_split_over_devices_decode_what_whole_ones_do(
    tied: bool, devices: PretendedDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pair(tied=tied)
    expected = nf.generate(*models, PROMPTS, CONFIG)
    first, last = ["cuda:0"] * 3 + ["cuda:1"] * 2, ["cuda:2"] * 3 + ["cuda:3"] * 2
    # accelerate keeps a tied head where the embeddings are, and any other where the last layer is.
    places = dict(zip(LAYERS, first, strict=True)) | {"lm_head": "cuda:0" if tied else "cuda:1"}
    split(devices, models[0], places, monkeypatch)
    split(devices, models[2], dict(zip(LAYERS, last, strict=True)) | {"score": "cuda:3"}, monkeypatch)
    with devices:
        output = nf.generate(*models, PROMPTS, CONFIG)
        backbone = LanguageModel(*models[:2]).backbone
        # A graph holds addresses on one device, and hooks that copy would not run when it is replayed.
        assert static.why_not(backbone) == "its weights are on several devices, or off-loaded"
    require_same(output, expected)
    assert all(devices.operations[f"cuda:{i}"] > 0 for i in range(4))
    head = places["lm_head"]
    assert devices.copies["cuda:2", head] > 0
    assert all(not devices.copies[f"cuda:{i}", f"cuda:{j}"] for i in (0, 1) for j in (2, 3))


def test_a_model_split_by_hooks_of_ones_own(devices: PretendedDevices) -> None:
    """Nothing moves token ids, positions and masks to the embeddings' device but the package itself."""
    models = pair(tied=False)
    expected = nf.generate(*models, PROMPTS, CONFIG)
    language_model, reward_model = models[0], models[2]
    for model, head, first, last in (
        (language_model, language_model.lm_head, "cuda:0", "cuda:1"),
        (reward_model, reward_model.score, "cuda:2", "cuda:3"),
    ):
        devices.put_module(model, first)
        for part in (model.model.layers[1], model.model.norm, head):
            devices.put_module(part, last)
        model.model.layers[1].register_forward_pre_hook(partial(moved, torch.device(last)), with_kwargs=True)
    with devices:
        output = nf.generate(*models, PROMPTS, CONFIG)
    require_same(output, expected)
    assert all(devices.operations[f"cuda:{i}"] > 0 for i in range(4))


def moved(device: torch.device, _: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))


def test_penalties_and_baselines_of_a_split_model(devices: PretendedDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are where the head is; transformers makes the processors' tensors where the embeddings are."""
    models = pair(tied=False)
    models[0].generation_config.min_new_tokens, models[0].generation_config.repetition_penalty = 4, 1.3
    expected = baselines.best_of_n(*models, PROMPTS, 2, CONFIG)
    places = dict.fromkeys(LAYERS[:3], "cuda:0") | dict.fromkeys((*LAYERS[3:], "lm_head"), "cuda:1")
    split(devices, models[0], places, monkeypatch)
    devices.put_module(models[2], "cuda:1")
    with devices:
        output = baselines.best_of_n(*models, PROMPTS, 2, CONFIG)
    assert [x.tolist() for x in output.sequences] == [x.tolist() for x in expected.sequences]
    assert output.rewards == pytest.approx(expected.rewards, abs=1e-9)


def test_a_reward_model_that_is_run_as_it_is_on_another_device(devices: PretendedDevices) -> None:
    models = pair()
    forward = models[2].forward

    def negated(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = -out.logits
        return out

    models[2].forward = negated
    with pytest.warns(UserWarning, match="run as it is"):
        expected = nf.generate(*models, PROMPTS, CONFIG)
    output = decoded_apart(models, devices)
    assert [x.tolist() for x in output.sequences] == [x.tolist() for x in expected.sequences]


def test_a_reward_function_sees_the_language_models_embeddings_where_they_are(devices: PretendedDevices) -> None:
    language_model, tokenizer, *_ = pair()
    seen = set()

    def score(embeds: Tensor, mask: Tensor) -> Tensor:
        seen.update((embeds.device, mask.device))
        return (embeds * mask.unsqueeze(-1)).square().sum((1, 2)).sqrt()

    devices.put_module(language_model, LANGUAGE)
    with devices:
        nf.generate(language_model, tokenizer, score, None, PROMPTS, CONFIG)
    assert seen == {torch.device(LANGUAGE)}


def test_the_drop_in_with_models_on_two_devices(devices: PretendedDevices) -> None:
    models = pair()
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    expected = nf.generate(*models, PROMPTS[0], CONFIG)
    ids = models[1].apply_chat_template(chats[0], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    devices.put_module(models[0], LANGUAGE)
    devices.put_module(models[2], REWARD)
    with devices:
        on_it = {name: x.to(torch.device(LANGUAGE)) for name, x in ids.items()}
        drop_in = nf.custom_generate(*models[1:], CONFIG, messages=chats[0])
        (row,) = models[0].generate(**on_it, custom_generate=drop_in, max_new_tokens=CONFIG.max_new_tokens)
        assert row.device == torch.device(LANGUAGE)
    assert row[ids["input_ids"].shape[1] :].tolist()[: len(expected.sequences[0])] == expected.sequences[0].tolist()


def test_dto_takes_a_start_from_any_device(devices: PretendedDevices) -> None:
    models = pair()
    start = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    messages = [{"role": "user", "content": "what is 3 times 4"}]
    expected = nf.dto.optimize(*models, messages, [5, 9], start, CONFIG)
    devices.put_module(models[0], LANGUAGE)
    devices.put_module(models[2], REWARD)
    with devices:
        result = nf.dto.optimize(*models, messages, [5, 9], start, CONFIG)
        assert result.parameters.device == torch.device(LANGUAGE)
        torch.testing.assert_close(result.parameters.cpu(), expected.parameters)


@pytest.mark.parametrize("reward", [LANGUAGE, REWARD])
def test_the_reward_models_stream_is_on_its_device_and_waits_there(
    reward: str, devices: PretendedDevices, streams: Streams
) -> None:
    models = pair()
    devices.put_module(models[0], LANGUAGE)
    devices.put_module(models[2], reward)
    with devices:
        output = nf.generate(*models, PROMPTS, CONFIG)
    (own,) = streams.made
    current = streams.current(reward)
    assert str(own.device) == reward
    # Before each block it waits for what its device was given, and afterwards the device waits for it.
    assert set(own.waits) == {current}
    assert set(current.waits) == {own}
    assert len(own.waits) == len(current.waits) == len(streams.entered)
    assert set(streams.entered) == {own}
    if reward != LANGUAGE:
        assert streams.current(LANGUAGE).waits == []
    # Its memory is kept until the current stream has read it: a factor for each evaluation, and rewards for each call.
    assert set(streams.recorded) == {(torch.device(reward), current)}
    assert len(streams.recorded) > output.stats.totals.gradient_evaluations


def test_mixing_devices_raises_in_forward_and_backward_passes(devices: PretendedDevices) -> None:
    """Or the tests above would show nothing."""
    with devices:
        here, there = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1", requires_grad=True)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            here + there
        moved = there.to(here.device)
        assert moved.device == torch.device("cuda:0")
        (gradient,) = torch.autograd.grad((moved * here).sum(), there)
        assert gradient.device == torch.device("cuda:1")
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            here[torch.tensor([1], device="cuda:1")]
        assert (here + torch.tensor(1.0)).device == torch.device("cuda:0")


@pytest.mark.parametrize("off_loaded", [(), ("model.layers.1",), ("model.layers.0", "model.layers.1")])
def test_hooks_and_off_loading_of_accelerate_change_nothing(off_loaded: tuple[str, ...], tmp_path: Path) -> None:
    models, hooked = pair(), pair()
    for model, last in ((hooked[0], "lm_head"), (hooked[2], "score")):
        device_map = dict.fromkeys((*LAYERS, last), "cpu") | dict.fromkeys(off_loaded, "disk")
        folder = tmp_path / type(model).__name__
        dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)
        assert model.hf_device_map == device_map
    may_be_captured = static.why_not(LanguageModel(*hooked[:2]).backbone) is None
    assert may_be_captured == (not off_loaded)
    require_same(nf.generate(*hooked, PROMPTS, CONFIG), nf.generate(*models, PROMPTS, CONFIG))


def test_a_device_map_of_one_device(tmp_path: Path) -> None:
    models, mapped = pair(), list(pair())
    for i in (0, 2):
        models[i].float().save_pretrained(tmp_path / str(i))
        mapped[i] = type(models[i]).from_pretrained(tmp_path / str(i), device_map={"": "cpu"}, dtype=torch.float32)
    config = CONFIG.replace(max_rollouts=1, rollout=nf.Sampling(temperature=0.0))
    expected, output = nf.generate(*models, PROMPTS, config), nf.generate(*mapped, PROMPTS, config)
    assert [x.tolist() for x in output.sequences] == [x.tolist() for x in expected.sequences]
    assert output.rewards == pytest.approx(expected.rewards, abs=1e-3)
