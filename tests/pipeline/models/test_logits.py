"""Logits at some positions, also of models whose forward cannot leave the others out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.models.logits import logits_at


@pytest.mark.parametrize("keeps", [True, False])
@torch.no_grad()
def test_they_are_the_rows_of_all_logits(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    ids, at = np.arange(1, 20, dtype=np.int32), np.array([0, 7, 18])
    expected = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0, at].float()
    if not keeps:
        own = model.forward

        def forward(input_ids: torch.Tensor, use_cache: bool) -> Any:
            return own(input_ids, use_cache=use_cache)

        monkeypatch.setattr(model, "forward", forward)
    found = logits_at(model, ids, at)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert not torch.allclose(found, expected.roll(1, 0), atol=0.1)
