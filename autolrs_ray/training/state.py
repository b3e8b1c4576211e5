"""All that trains in a task, read out, written back and put back to the start: modules, optimizers, scaler."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autolrs_ray.record.checkpoints import plain, snapshot
from autolrs_ray.training.attributes import Attributes, nested_optimizers
from autolrs_ray.training.averages import expanded
from autolrs_ray.training.optimizers import parameters_of
from autolrs_ray.training.task import TrainingTask


class TaskState:
    """The state of `task`, whose modules are on `device` already; `reset` goes back to what it is now.

    Buffers that no state_dict holds are saved where they are no longer what they were at the start, so that a counter is and
    a large mask is not. Buffers that forward assigns anew, or registers, may have another shape than at the start.
    """

    def __init__(self, task: TrainingTask, device: torch.device) -> None:
        self.device, self.optimizers, self.scaler = device, task.optimizers, task.scaler
        self.modules: dict[str, nn.Module] = {"model": task.model, **task.saved_modules()}
        self._nested = nested_optimizers(self.optimizers)
        optimizers = {f"optimizers[{i}]": optimizer for i, optimizer in enumerate(self.optimizers)}
        called = {"augment": task.augment, **{f"metrics[{name}]": metric for name, metric in task.metrics.items()}}
        metrics = [metric for metric in task.metrics.values() if isinstance(metric, nn.Module)]
        self.roots = {**self.modules, "loss": task.loss, **called, **optimizers}
        given = (*self.modules.values(), *self.optimizers, *metrics, self.scaler)
        data = [part for data in (task.train_data, task.val_data) if isinstance(data, tuple) for part in data]
        self.attributes = Attributes(self.roots, given, tuple(data), device)
        self._held = set(map(id, parameters_of(self.optimizers)))  # at the start
        self._built = {name: id(parameter) for name, parameter in self._named_parameters()}
        self._initial_buffers = {name: _cloned(tensor) for name, _, _, tensor in self._unsaved()}
        self._initial = copy.deepcopy(self._read({}, {}))

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, module in self.modules.items():
            yield from module.named_parameters(prefix=name)

    def _require_built_parameters(self) -> None:
        now = {name: id(parameter) for name, parameter in self._named_parameters()}
        names = sorted(name for name in now.keys() | self._built.keys() if now.get(name) != self._built.get(name))
        if names:
            raise ValueError(
                f"{', '.join(names[:3])}: added, taken away or replaced since the task was built, which no optimizer has "
                "noticed and no checkpoint could be loaded into. Build all layers at the start: freeze with "
                "requires_grad_(False), or skip, those that are not to be used yet"
            )

    def _groups(self) -> list[list[list[str]]]:
        """Of every group of every optimizer the names of its parameters."""
        names = {id(parameter): name for name, parameter in self._named_parameters()}
        parameters = [[group["params"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        for part in (p for groups in parameters for group in groups for p in group):
            if id(part) not in names and id(part) not in self._held:
                raise ValueError(
                    f"a parameter of shape {tuple(part.shape)} that the optimizer was given while the task trained belongs to "
                    'no module that is saved: pass the module it is of as modules={"name": module}'
                )
        return [[[names.get(id(p), "") for p in group] for group in groups] for groups in parameters]

    def _regroup(self, groups: list[list[list[str]]], states: list[dict[str, Any]]) -> None:
        """Give the optimizers the groups that they had when `states` were saved, where groups were added or are yet to be."""
        if groups == self._groups():
            return
        parameters = dict(self._named_parameters())
        for optimizer, names, state in zip(self.optimizers, groups, states, strict=True):
            options = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
            optimizer.param_groups[:] = [
                {"params": [parameters[name] for name in each], **copy.deepcopy(rest)}
                for each, rest in zip(names, options, strict=True)
            ]

    def _unsaved(self) -> Iterator[tuple[str, nn.Module, str, Tensor | None]]:
        """Name, owner, attribute and value of every buffer that no state_dict holds."""
        for name, module in self.modules.items():
            for prefix, owner in module.named_modules(prefix=name):
                for attribute in sorted(owner._non_persistent_buffers_set):
                    yield f"{prefix}.{attribute}", owner, attribute, owner._buffers.get(attribute)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values. Raises TypeError that names a value which a checkpoint cannot hold."""
        buffers = {
            name: tensor
            for name, _, _, tensor in self._unsaved()
            if name not in self._initial_buffers or not _same(tensor, self._initial_buffers[name])
        }
        return self._read(buffers, self.attributes.state_dict())

    def _read(self, buffers: dict[str, Tensor | None], attributes: dict[str, Any]) -> dict[str, Any]:
        self._require_built_parameters()
        others = {name: module.state_dict() for name, module in self.modules.items() if name != "model"}
        state = {
            "model": self.modules["model"].state_dict(),
            "others": others,
            "buffers": buffers,
            "attributes": attributes,
            "frozen": [name for name, parameter in self._named_parameters() if not parameter.requires_grad],
            "groups": self._groups(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }
        return {name: plain(value, name) for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._require_built_parameters()
        for name, module in self.modules.items():
            values = state["model"] if name == "model" else state["others"][name]
            self._fit(module, values)
            module.load_state_dict(values)
        self._load_unsaved(state["buffers"])
        if "groups" in state:
            self._regroup(state["groups"], state["optimizers"])
            self._freeze(set(state["frozen"]))
        shared = [(outer, inner, _shared(outer, inner)) for outer, inner in self._nested]
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.attributes.load_state_dict(state.get("attributes", {}))
        for outer, inner, names in shared:
            for name in names:
                setattr(outer, name, getattr(inner, name))

    def _freeze(self, frozen: set[str]) -> None:
        for name, parameter in self._named_parameters():
            if parameter.requires_grad == (name in frozen):
                parameter.requires_grad_(name not in frozen)

    def reset(self) -> None:
        """Back to the start."""
        self.load_state_dict(copy.deepcopy(self._initial))

    def copy_state_dict(self, state: Mapping[str, Any]) -> None:
        """As load_state_dict, from tensors that are neither kept nor written to: all are copied, those of the optimizers into
        the memory in use where they fit (fresh memory costs several times the copy)."""
        before = [dict(optimizer.state) for optimizer in self.optimizers]
        models = [state["model"], *state["others"].values()]
        plainly = all(type(o).load_state_dict is Optimizer.load_state_dict for o in self.optimizers)
        if not plainly or any(name.endswith("_extra_state") for values in models for name in values):
            state = snapshot(state)
        self.load_state_dict(state)
        for optimizer, old in zip(self.optimizers, before, strict=True):
            for parameter, values in optimizer.state.items():
                optimizer.state[parameter] = _copied(values, old.get(parameter))
        given = {address for values in models for address in _addresses(values)}
        if any(given & _addresses(module.state_dict()) for module in self.modules.values()):
            self.load_state_dict(snapshot(state))  # a model that keeps what it is given

    def _fit(self, module: nn.Module, values: Mapping[str, Any]) -> None:
        """Give `module` buffers of the shapes in `values`, where forward assigns others than it was built with."""
        for prefix, owner in module.named_modules():
            for attribute in set(owner._buffers) - owner._non_persistent_buffers_set:
                name = f"{prefix}.{attribute}" if prefix else attribute
                new, now = values.get(name), owner._buffers[attribute]
                if new is None:
                    owner._buffers[attribute] = None
                elif now is None or (now.shape, now.dtype) != (new.shape, new.dtype) or expanded(now):
                    owner._buffers[attribute] = torch.empty_like(
                        new, device=self.device, memory_format=torch.contiguous_format
                    )

    def _load_unsaved(self, buffers: Mapping[str, Tensor | None]) -> None:
        wanted = {**self._initial_buffers, **buffers}
        for name, owner, attribute, tensor in list(self._unsaved()):
            if name not in wanted:  # registered by a forward that is yet to come
                del owner._buffers[attribute]
                owner._non_persistent_buffers_set.discard(attribute)
            elif not _same(tensor, wanted[name]):
                owner._buffers[attribute] = _cloned(wanted[name], self.device)
        present = {name for name, _, _, _ in self._unsaved()}
        for name in set(buffers) - present:
            path, _, attribute = name.rpartition(".")
            module, _, inner = path.partition(".")
            owner = self.modules[module].get_submodule(inner)
            owner.register_buffer(attribute, _cloned(buffers[name], self.device), persistent=False)


def _shared(outer: Optimizer, inner: Optimizer) -> list[str]:
    """What an optimizer has in common with one that it holds, and is to have in common again once both were loaded."""
    return [name for name in ("param_groups", "state") if getattr(inner, name) is getattr(outer, name)]


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return (one.shape, one.dtype) == (two.shape, two.dtype) and torch.equal(one, two.to(one.device))


def _cloned(tensor: Tensor | None, device: torch.device | None = None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(device or tensor.device, copy=True)


def _addresses(state: Mapping[str, Any]) -> set[int]:
    """Where the tensors of `state` lie in memory."""
    return {value.data_ptr() for value in state.values() if isinstance(value, Tensor) and value.numel()}


def _copied(new: Any, old: Any) -> Any:
    """A copy of `new`, the state of an optimizer, in the tensors of `old` where these are alike."""
    if isinstance(new, dict):
        old = old if isinstance(old, dict) else {}
        return {key: _copied(value, old.get(key)) for key, value in new.items()}
    if isinstance(new, (list, tuple)):
        return type(new)(_copied(value, None) for value in new)
    if not isinstance(new, Tensor):
        return new
    alike = isinstance(old, Tensor) and (old.shape, old.stride()) == (new.shape, new.stride())
    return old.copy_(new) if alike and (old.dtype, old.device) == (new.dtype, new.device) else new.clone()
