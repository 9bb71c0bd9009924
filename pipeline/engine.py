"""The engines: they turn losses into updates, and give a checkpoint its weights and moments.

    Engine            one process, or DDP over several
    DeepSpeedEngine   ZeRO 0 to 3

Both keep weights, gradients and moments in fp32 (fp64 if the recipe asks for it) and compute in autocast for
bf16. Weights and moments are exchanged as whole tensors under their parameters' names. So a run can resume
with another engine.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from . import checkpoint, processes
from .build_model import TrainedModel
from .config import Recipe
from .launch_checks import deepspeed_values
from .matrices import block_matrices
from .muon import Muon
from .optim import build_optimizer
from .zero_shards import zero_shards

Tensors = dict[str, Tensor]


def autocast(model: nn.Module, precision: str, device: torch.device) -> None:
    """Run the model's forward in autocast if the precision is bf16.

    This wraps `model.forward` itself, because DeepSpeed disables autocast around the model.
    """
    if precision == "bf16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)


def build_engine(
    recipe: Recipe, accelerator: Accelerator, model: TrainedModel, saved: Path | None
) -> "Engine":
    """Prepare a model for training. Collective.

    Args:
        model: with a checkpoint's weights already loaded, if there is one.
        saved: checkpoint whose moments are loaded.
    """
    cls = DeepSpeedEngine if accelerator.state.deepspeed_plugin is not None else Engine
    autocast(model, recipe.train.precision, accelerator.device)
    return cls(recipe, accelerator, model, saved)


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


class Engine:
    """Training in one process, or with DDP."""

    name = "DDP"
    in_lockstep = False
    """Whether a forward pass is a collective, so that all processes must run the same number of them."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, model: TrainedModel, saved: Path | None):
        self.accelerator, self.module, self.clip = accelerator, model, recipe.optim.clip or math.inf
        self.num_parameters = model.num_parameters()
        nn.Module.to(model, accelerator.device)
        optimizer = build_optimizer(model, recipe.optim, recipe.train.precision)
        if saved is not None:
            checkpoint.load_moments(checkpoint.read_moments(saved), model, optimizer)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        processes.check_wrapped(accelerator, self.model)
        self.model.train()

    def forward(self, **inputs: Any) -> Any:
        """The model's output."""
        return self.model(**inputs)

    def accumulating(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """A context for forward and backward of one batch of a step; gradients are reduced after the last."""
        return contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss."""
        loss.backward()

    def update(self, lr: float) -> float:
        """Clip, step and clear the gradient; returns its norm. If that is not finite, nothing is updated."""
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip))
        if math.isfinite(norm):
            self._set_lr(lr)
            self.optimizer.step()
        self.discard()
        return norm

    def discard(self) -> None:
        """Clear the gradient."""
        self.optimizer.zero_grad()

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def weights(self, keep: bool) -> Tensors:
        """Copies of all parameters in main memory, by name. Collective; ranks with `keep` False get an empty
        dict."""
        return (
            {name: _cpu_copy(parameter) for name, parameter in self.module.named_parameters()} if keep else {}
        )

    def moments(self, keep: bool) -> Tensors:
        """Copies of the optimizer's state: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`, or
        `momentum_buffer.NAME` of Muon's matrices. As `weights`."""
        if not keep:
            return {}
        state = getattr(self.optimizer, "optimizer", self.optimizer).state
        named = self.module.named_parameters()
        return {
            f"{key}.{name}": _cpu_copy(torch.as_tensor(value))
            for name, parameter in named
            for key, value in state[parameter].items()
        }


class DeepSpeedEngine(Engine):
    """DeepSpeed through Accelerate, ZeRO stage 0 to 3."""

    name = "DeepSpeed"

    def __init__(self, recipe: Recipe, accelerator: Accelerator, model: TrainedModel, saved: Path | None):
        self.accelerator, self.module, self.clip = accelerator, model, recipe.optim.clip or math.inf
        self.num_parameters = model.num_parameters()
        config = cast(Any, accelerator.state.deepspeed_plugin).deepspeed_config
        self.stage = int(config.get("zero_optimization", {}).get("stage", 0))
        self.name, self.in_lockstep = f"ZeRO-{self.stage}", self.stage == 3
        # Stage 0 does not report the gradient's norm, so it is clipped in `update`. The other stages clip
        # during their step and report the norm afterwards.
        config.update(deepspeed_values(recipe) | ({"gradient_clipping": 0.0} if self.stage == 0 else {}))
        # torch's fused AdamW runs on CPUs too, and needs no compilation. Our Muon is unknown to DeepSpeed.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
        config.setdefault("zero_allow_untested_optimizer", True)
        config.setdefault("steps_per_print", 2**31)
        config.pop("bf16", None)
        config.pop("fp16", None)
        matrices = block_matrices(model) if recipe.optim.name == "muon" else {}
        optimizer = build_optimizer(model, recipe.optim, recipe.train.precision)
        self.model, _ = accelerator.prepare(model, optimizer)
        self.optimizer = self.model.optimizer
        self.moment_keys = {
            name: ("momentum_buffer",) if name in matrices else ("exp_avg", "exp_avg_sq")
            for name, _ in self._named_parameters()
        }
        if matrices:
            inner = self._inner
            assert isinstance(inner, Muon), f"DeepSpeed has replaced Muon by {type(inner).__name__}"
            if self.stage > 0:
                named = dict(self._named_parameters())
                inner.shards = zero_shards(self.optimizer, self.stage, named, matrices, accelerator)
        if saved is not None:
            self._load_moments(checkpoint.read_moments(saved))
        self.model.train()

    def accumulating(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        self.model.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        # A copy, because DeepSpeed 0.19 divides the gradient of the model's output itself by the accumulation
        # steps, even with scale_wrt_gas=False.
        self.model.backward(1.0 * loss, scale_wrt_gas=False)

    def update(self, lr: float) -> float:
        """As `Engine.update`. ZeRO itself skips an update whose gradient is not finite."""
        self._set_lr(lr)
        if self.stage == 0:
            norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip))
            if math.isfinite(norm):
                self.model.step()
            return norm
        self.model.step()
        return float(self.model.get_global_grad_norm())

    def discard(self) -> None:
        raise NotImplementedError("DeepSpeed has shared out the gradient already.")

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """torch's optimizer; from stage 1 on it holds flat pieces of all parameters."""
        return self.optimizer.optimizer if self.stage > 0 else self.optimizer

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.module.named_parameters())

    def weights(self, keep: bool) -> Tensors:
        if self.stage == 0:
            return super().weights(keep)
        from deepspeed.utils import safe_get_full_fp32_param

        return self._collect(keep, lambda name, parameter: {name: safe_get_full_fp32_param(parameter)})

    def moments(self, keep: bool) -> Tensors:
        if self.stage == 0:
            return super().moments(keep)
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_moments()

        def get(name: str, parameter: nn.Parameter) -> dict[str, Any]:
            keys = self.moment_keys[name]
            return {f"{key}.{name}": safe_get_full_optimizer_state(parameter, key) for key in keys}

        tensors = self._collect(keep, get)
        if not keep:
            return tensors
        step = next(state["step"] for state in self._inner.state.values() if "step" in state)
        step = torch.as_tensor(step, dtype=torch.float32).cpu()
        counted = [name for name, keys in self.moment_keys.items() if "exp_avg" in keys]
        return tensors | {f"step.{name}": step.clone() for name in counted}

    def _collect(self, keep: bool, get: Callable[[str, nn.Parameter], dict[str, Any]]) -> Tensors:
        """Gather the tensors of each parameter from the shards of all processes, one parameter after the
        other. Ranks with `keep` False discard them.

        Args:
            get: collective; the name and a parameter -> whole tensors by their names.
        """
        tensors: Tensors = {}
        for name, parameter in self._named_parameters():
            whole, shape = get(name, parameter), getattr(parameter, "ds_shape", parameter.shape)
            if keep:
                tensors |= {key: _cpu_copy(tensor.view(shape)) for key, tensor in whole.items()}
        return tensors

    def _link_moments(self) -> None:
        """Tell each parameter where its moments are.

        DeepSpeed 0.19 does this after the first step of the first parameter group, when the second has no
        moments yet.
        """
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _load_moments(self, saved: Tensors) -> None:
        if self.stage == 0:
            checkpoint.load_moments(saved, self.module, self._inner)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        step = next(tensor for name, tensor in saved.items() if name.startswith("step."))
        flat = (
            self.optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.optimizer.single_partition_of_fp32_groups
        )
        shards = self._inner.shards if isinstance(self._inner, Muon) else {}
        for shard in flat:  # as the first step would create them
            if shard in shards:
                self._inner.state[shard] = {"momentum_buffer": torch.zeros_like(shard)}
                continue
            self._inner.state[shard] = {
                "step": step.to(shard.device, torch.float32, copy=True),
                "exp_avg": torch.zeros_like(shard),
                "exp_avg_sq": torch.zeros_like(shard),
            }
        self._link_moments()
        for name, parameter in self._named_parameters():
            for key in self.moment_keys[name]:
                safe_set_full_optimizer_state(
                    parameter, saved[f"{key}.{name}"].to(self.accelerator.device), key
                )
