"""NDIF's model actors on a machine without a GPU; imported by the server, never by the package or its tests."""

from __future__ import annotations

from typing import Any

import ray
import torch
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel

torch.cuda.synchronize = lambda *_: None  # NDIF waits for its device after each request


class OnCpu:
    """Loads the model onto the CPU, whatever device it was given."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{**arguments, "gpu_mem_bytes_by_id": {}})

    def load_from_disk(self) -> Any:
        torch.set_num_threads(1)
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model


@ray.remote(num_cpus=0, max_restarts=-1)
class CpuModelActor(OnCpu, BaseModelDeployment):
    """Runs blocks in its own process, as NDIF does for trusted requests."""


@ray.remote(num_cpus=0, max_restarts=-1)
class CpuSandboxActor(OnCpu, SandboxModelDeployment):
    """Runs every block in a runner process, as NDIF does for requests that are not trusted."""

    def execute(self, request: Any) -> Any:
        return self.run_in_runner(request, None)
