"""A causal language model's logits at some positions of one sequence."""

import inspect

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.types import Int32s, Int64s


def logits_at(model: PreTrainedModel, input_ids: Int32s, positions: Int64s) -> Tensor:
    """float32 [P, V], on the model's device: logits over the tokens after the positions [P].

    The body reads all tokens [T], and the head only these positions, where the model can do that.
    """
    at = torch.from_numpy(positions).to(model.device)
    ids = torch.from_numpy(input_ids[None].astype(np.int64)).to(model.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(ids, use_cache=False, logits_to_keep=at).logits[0].float()
    return model(ids, use_cache=False).logits[0, at].float()
