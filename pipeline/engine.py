"""The engines: what turns losses into updates, and what a checkpoint needs of them.

    Engine            one process, or DDP over several
    DeepSpeedEngine   ZeRO 0 to 3

Both keep weights, gradients and moments in fp32 (fp64 if the recipe says so) and compute in autocast where it says bf16, so that a run goes on
with another engine. Weights and moments leave an engine whole, under their parameters' names, and come back the same way.
"""

import contextlib
import math
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..models import MinRNNForCausalLM
from . import checkpoint, processes
from .config import Recipe
from .launch_checks import deepspeed_values
from .optim import build_optimizer

Tensors = dict[str, Tensor]


def autocast(model: nn.Module, precision: str, device: torch.device) -> None:
    """Run the model's forward in autocast where the recipe says bf16. Inside the model, since DeepSpeed switches off what is around it."""
    if precision == "bf16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)


def build_engine(
    recipe: Recipe, accelerator: Accelerator, model: MinRNNForCausalLM, saved: Path | None
) -> "Engine":
    """Make a model ready for training, with the moments of a checkpoint if there is one (its weights are in the model already).

    Called by all processes alike.
    """
    cls = DeepSpeedEngine if accelerator.state.deepspeed_plugin is not None else Engine
    autocast(model, recipe.train.precision, accelerator.device)
    return cls(recipe, accelerator, model, saved)


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


class Engine:
    """One process, or DDP."""

    name = "DDP"
    in_lockstep = False
    """Whether a forward pass is a matter of all processes, so that all must take the same number of them."""

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, model: MinRNNForCausalLM, saved: Path | None
    ):
        self.accelerator, self.module, self.clip = accelerator, model, recipe.optim.clip or math.inf
        self.num_parameters = model.num_parameters()
        nn.Module.to(model, accelerator.device)
        optimizer = build_optimizer(model, recipe.optim)
        if saved is not None:
            checkpoint.put_moments(checkpoint.read_moments(saved), model, optimizer)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        processes.check_wrapped(accelerator, self.model)
        self.model.train()

    def forward(self, **inputs: Any) -> Any:
        """The model's output."""
        return self.model(**inputs)

    def accumulating(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of one of a step's batches: gradients are shared after the last."""
        return contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient."""
        loss.backward()

    def update(self, lr: float) -> float:
        """Clip and step, and forget the gradient; returns its norm. Nothing is updated where that is not finite."""
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip))
        if math.isfinite(norm):
            self._set_lr(lr)
            self.optimizer.step()
        self.discard()
        return norm

    def discard(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad()

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def weights(self, wanted: bool) -> Tensors:
        """Copies of all parameters in main memory, by name; empty unless wanted. Called by all processes alike."""
        return {name: _own(parameter) for name, parameter in self.module.named_parameters()} if wanted else {}

    def moments(self, wanted: bool) -> Tensors:
        """The optimizer's state in the same way: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`."""
        if not wanted:
            return {}
        state = getattr(self.optimizer, "optimizer", self.optimizer).state
        named = self.module.named_parameters()
        return {
            f"{key}.{name}": _own(torch.as_tensor(value))
            for name, parameter in named
            for key, value in state[parameter].items()
        }


class DeepSpeedEngine(Engine):
    """DeepSpeed through Accelerate, ZeRO stage 0 to 3. Each process holds its share of moments, gradients and weights, as the stage says."""

    name = "DeepSpeed"

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, model: MinRNNForCausalLM, saved: Path | None
    ):
        self.accelerator, self.module, self.clip = accelerator, model, recipe.optim.clip or math.inf
        self.num_parameters = model.num_parameters()
        config = cast(Any, accelerator.state.deepspeed_plugin).deepspeed_config
        self.stage = int(config.get("zero_optimization", {}).get("stage", 0))
        self.name, self.in_lockstep = f"ZeRO-{self.stage}", self.stage == 3
        # Stage 0 has no norm to show, so it is clipped here; the other stages clip while they step, and show it afterwards.
        config.update(deepspeed_values(recipe) | ({"gradient_clipping": 0.0} if self.stage == 0 else {}))
        config.setdefault(
            "zero_force_ds_cpu_optimizer", False
        )  # torch's fused AdamW runs on CPUs too, and has nothing to compile
        config.setdefault("steps_per_print", 2**31)
        config.pop("bf16", None)
        config.pop("fp16", None)
        for group in (optimizer := build_optimizer(model, recipe.optim)).param_groups:
            group["lr"] = torch.as_tensor(group["lr"]).item()
        self.model, _ = accelerator.prepare(model, optimizer)
        self.optimizer = self.model.optimizer
        if saved is not None:
            self._load_moments(checkpoint.read_moments(saved))
        self.model.train()

    def accumulating(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        self.model.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        # Not the model's output itself: DeepSpeed 0.19 divides that tensor's gradient by the accumulation steps, whatever it is told.
        self.model.backward(1.0 * loss, scale_wrt_gas=False)

    def update(self, lr: float) -> float:
        """As `Engine.update`; ZeRO leaves out an update whose gradient is not finite by itself."""
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
        """torch's optimizer, over flat pieces of all parameters from stage 1 on."""
        return self.optimizer.optimizer if self.stage > 0 else self.optimizer

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.module.named_parameters())

    def weights(self, wanted: bool) -> Tensors:
        if self.stage == 0:
            return super().weights(wanted)
        from deepspeed.utils import safe_get_full_fp32_param

        return self._collect(wanted, {"": safe_get_full_fp32_param})

    def moments(self, wanted: bool) -> Tensors:
        if self.stage == 0:
            state = self._inner.state
            named = self._named() if wanted else []
            return {
                f"{key}.{name}": _own(torch.as_tensor(value))
                for name, p in named
                for key, value in state[p].items()
            }
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_moments()

        def get(key: str) -> Any:
            return lambda parameter: safe_get_full_optimizer_state(parameter, key)

        tensors = self._collect(wanted, {f"{key}.": get(key) for key in ("exp_avg", "exp_avg_sq")})
        step = torch.as_tensor(next(iter(self._inner.state.values()))["step"], dtype=torch.float32).cpu()
        return tensors | ({f"step.{name}": step.clone() for name, _ in self._named()} if wanted else {})

    def _collect(self, wanted: bool, getters: dict[str, Any]) -> Tensors:
        """Assemble each tensor from all processes' shares, one after the other; only who wants them keeps them."""
        tensors: Tensors = {}
        for name, parameter in self._named():
            for prefix, get in getters.items():
                tensor = get(parameter)
                if wanted:
                    shape = getattr(parameter, "ds_shape", parameter.shape)
                    tensors[prefix + name] = _own(tensor.view(shape))
        return tensors

    def _link_moments(self) -> None:
        """Tell each parameter where its moments lie. DeepSpeed 0.19 does so after the first group's first step, when the second has none."""
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _load_moments(self, saved: Tensors) -> None:
        if self.stage == 0:
            checkpoint.put_moments(saved, self.module, self._inner)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        step = next(tensor for name, tensor in saved.items() if name.startswith("step."))
        flat = (
            self.optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.optimizer.single_partition_of_fp32_groups
        )
        for share in flat:  # as the first step would make them
            self._inner.state[share] = {
                "step": step.to(share.device, torch.float32, copy=True),
                "exp_avg": torch.zeros_like(share),
                "exp_avg_sq": torch.zeros_like(share),
            }
        self._link_moments()
        for name, parameter in self._named():
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(
                    parameter, saved[f"{key}.{name}"].to(self.accelerator.device), key
                )
