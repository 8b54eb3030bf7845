"""Count how often a step of the criterion makes host and device wait for each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from detrs.structures import Images, Targets
from detrs.zoo import BackboneConfig, DinoConfig, build

# Operators for which the host waits for the device: they read a value, or their shape depends on values
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Count operators that read values, and boolean indices, whose size has to be read first."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        boolean = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in WAITING or boolean:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_a_step_transfers_to_the_host_once_and_back_once(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    small = DinoConfig(
        num_classes=5, backbone=BackboneConfig("small", "batch", 0), hidden_dim=32, num_heads=4, ffn_dim=32,
        num_encoder_layers=1, num_decoder_layers=3, num_queries=10, num_denoising=10,
    )  # fmt: skip
    model = build(small)
    boxes = torch.rand(sum(counts), 4) * 0.4 + 0.2
    targets = Targets(torch.randint(5, (sum(counts),)), boxes, counts)
    images = Images(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool))
    outputs = model.detector.train()(images, targets)
    transfers: Counter[str] = Counter()
    for name in ("cpu", "numpy", "tolist", "item"):
        original = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, *rest: Any, _name: str = name, _original: Any = original) -> Any:
            transfers[_name] += 1
            return _original(tensor, *rest)

        monkeypatch.setattr(torch.Tensor, name, counted)
    to_tensor = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: (transfers.update(["back"]), to_tensor(array))[1])
    with Waits() as waits:
        losses = model.criterion(outputs, targets, 5.0)
        losses.total.backward()
    assert waits.found == {}
    # One transfer to the host (`numpy` is a view of the result of `cpu`) and one back, for three decoder
    # layers, the encoder and the denoising queries together.
    assert transfers == {"cpu": 1, "numpy": 1, "back": 1}
