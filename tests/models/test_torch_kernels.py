"""The choice of attention on a GPU, which is a setting of the whole process."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.models import fused_layers


def test_cudnn_attention_is_off_in_a_gpus_blocks_and_put_back() -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    try:
        for setting in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(setting)
            with fused_layers.fast_kernels(torch.device("cuda")):
                with pytest.raises(KeyError), fused_layers.fast_kernels(torch.device("cuda")):
                    raise KeyError
                assert not enabled()
            assert enabled() is setting
            with fused_layers.fast_kernels(torch.device("cpu")):
                assert enabled() is setting
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_blocks_of_threads_may_overlap() -> None:
    """The first to begin ends first, and the switch stays off until the other ends."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        first, second = (fused_layers.fast_kernels(torch.device("cuda")) for _ in range(2))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not enabled()
        second.__exit__(None, None, None)
        assert enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
