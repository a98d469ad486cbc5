"""The names of the ops that the library has registered."""

from __future__ import annotations

import torch

import llm_ext._C  # noqa: F401  (importing it registers the ops)


def tensor_ops() -> list[str]:
    """Names of the ops with tensors, sorted. The others, of llm_ext/_C.py, have no device, gradient or fake kernel."""
    registered = torch._C._dispatch_get_all_op_names()
    names = {name.split("::")[1].split(".")[0] for name in registered if name.startswith("llm_ext::")}
    return sorted(name for name in names if "Tensor" in str(getattr(torch.ops.llm_ext, name).default._schema))
