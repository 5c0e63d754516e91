"""Options for single parameters, set for the whole process: `GlobalOptimManager`."""

from __future__ import annotations

import weakref
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import torch

from bnb_core.errors import BnbError, InvalidArgumentError


class GlobalOptimManager:
    """Options that take the place of a parameter group's for some parameters, such as 32-bit states for an embedding.

    There is one for the process, `GlobalOptimManager.get_instance()`. An override holds in every optimizer that has the parameter,
    from the next step on; `optim_bits` and `min_8bit_size` only where the parameter has no state yet.

    Example:
        >>> manager = GlobalOptimManager.get_instance()
        >>> manager.override_config(model.lm_head.weight, "optim_bits", 32)
        >>> manager.register_module_override(model.embedding, "weight", {"optim_bits": 32})
    """

    _instance: "Optional[GlobalOptimManager]" = None

    def __init__(self) -> None:
        raise BnbError("there is one GlobalOptimManager for the process; call GlobalOptimManager.get_instance()")

    @classmethod
    def get_instance(cls) -> "GlobalOptimManager":
        """Return the manager of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget all overrides."""
        self._params: "Dict[int, Tuple[weakref.ref[torch.Tensor], Dict[str, Any]]]" = {}
        self._modules: "List[Tuple[weakref.ref[torch.nn.Module], str, Dict[str, Any]]]" = []
        self._changes = getattr(self, "_changes", 0) + 1

    @property
    def changes(self) -> int:
        """A number that differs after every change of the overrides."""
        return self._changes

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Check that these are what an optimizer takes. bitsandbytes has callers say which parameters overrides may name.

        Here overrides find their parameters by identity, whether these are registered or not.

        Args:
            params: parameters, or parameter groups.

        Raises:
            InvalidArgumentError: something else is among them.
        """
        for entry in params:
            for param in entry.get("params", [None]) if isinstance(entry, dict) else [entry]:
                if not isinstance(param, torch.Tensor):
                    raise InvalidArgumentError(
                        f"register_parameters: {type(param).__name__} is no parameter; pass tensors, or groups that have 'params'"
                    )

    def override_config(
        self,
        parameters: Union[torch.Tensor, Iterable[torch.Tensor]],
        key: Optional[str] = None,
        value: Any = None,
        key_value_dict: Optional[Mapping[str, Any]] = None,
    ) -> None:
        """Set options of parameters.

        Args:
            parameters: a parameter or several.
            key, value: one option, by its name in a parameter group (`"lr"`, `"betas"`, …) or `"optim_bits"`, `"min_8bit_size"`,
                `"max_unorm"`, `"skip_zeros"`.
            key_value_dict: several options at once, in place of `key` and `value`.

        Raises:
            InvalidArgumentError: neither or both of `key` and `key_value_dict` are given. An option that an optimizer does not
                have is found at its next step.
        """
        if (key is None) == (key_value_dict is None):
            raise InvalidArgumentError(
                f"override_config: key is {key!r} and key_value_dict is {key_value_dict!r}; give one of them"
            )
        config = {str(key): value} if key_value_dict is None else dict(key_value_dict)
        for param in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
            reference, former = self._params.get(id(param), (None, {}))
            if reference is None or reference() is not param:  # a tensor that is gone, whose address this one has got
                former = {}
            self._params[id(param)] = (weakref.ref(param), {**former, **config})
        self._changes += 1

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Set options of a module's parameter, which may be replaced until a step is taken.

        Args:
            module: the module that has the parameter.
            param_name: name of the attribute, such as `"weight"`.
            config: options, as in `override_config`, which goes before this where both set one.
        """
        self._modules.append((weakref.ref(module), param_name, dict(config)))
        self._changes += 1

    def overrides(self) -> Dict[int, Dict[str, Any]]:
        """Return the options that are set, by the `id` of the parameter.

        Raises:
            InvalidArgumentError: a module override names something else than a parameter.
        """
        configs: Dict[int, Dict[str, Any]] = {}
        for module, name, config in ((reference(), name, config) for reference, name, config in self._modules):
            if module is not None:
                param = getattr(module, name, None)
                if not isinstance(param, torch.Tensor):
                    raise InvalidArgumentError(
                        f"register_module_override: {name!r} of {type(module).__name__} is {param!r}; it must be a parameter"
                    )
                configs.setdefault(id(param), {}).update(config)
        for key, (reference, config) in self._params.items():
            if reference() is not None:
                configs.setdefault(key, {}).update(config)
        return configs
