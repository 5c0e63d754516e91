"""The optimizer that all algorithms share: options, the step, and checkpoints."""

from __future__ import annotations

import importlib
from typing import Any, Callable, ClassVar, Dict, Mapping, Optional, Tuple, Type, TypeVar

import torch

from bnb_core.errors import CaptureError, InvalidArgumentError
from bnb_core.ops.checks import FLOAT_DTYPES
from bnb_core.ops.optimizer import required_states
from bnb_core.ops.spec import Hyperparameters
from bnb_core.optim import checkpoint
from bnb_core.optim.plan import Override, Plan, share_steps
from bnb_core.optim.resharding import adapt
from bnb_core.optim.state_formats import FORMATS, Slots, format_of

#: Options of the whole optimizer. A parameter group or `GlobalOptimManager` may set them for some parameters.
GENERAL_OPTIONS = ("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros")

#: Fields of `Hyperparameters` with their types: float, int or bool.
_KINDS = {name: type(default) for name, default in zip(Hyperparameters._fields, Hyperparameters())}

_NOT_NEGATIVE = (
    *("lr", "eps", "weight_decay", "momentum", "alpha", "t_alpha", "t_beta3", "lr_decay", "initial_accumulator_value"),
    *("min_8bit_size", "max_unorm"),
)

_Function = TypeVar("_Function", bound=Callable[..., Any])
#: Keeps a method out of compiled graphs.
_outside_graphs: Callable[[_Function], _Function] = getattr(torch, "_disable_dynamo", lambda function: function)


class MockArgs:
    """An object that has the entries of a dictionary as attributes, such as an optimizer's `args`.

    Args:
        initial_data: the attributes by name.
    """

    def __init__(self, initial_data: Mapping[str, Any]) -> None:
        vars(self).update(initial_data)


class Optimizer(torch.optim.Optimizer):
    """An optimizer with 32-bit or blockwise 8-bit states; the base of all algorithms, which say what is theirs in class attributes.

    To make one of your own, derive from the class of an algorithm, such as `Adam`, or from `Optimizer1State` or `Optimizer2State`.

    Each step updates all parameters of one device, dtype and set of options in one call of an op. Parameters may have any
    strides. An element whose gradient is not finite keeps its value and its state.

    Args:
        params: parameters, or dictionaries that set options for some of them. Any option below or in `defaults` may be among these.
        defaults: options of the algorithm, by name.
        optim_bits: 32 or 8, the format of states. Those that a parameter has keep their format.
        is_paged: keep the states in memory that a GPU's driver can move out of the GPU. On CPUs, on GPUs that share the CPU's
            memory, and wherever such memory is not supported, the states are in ordinary memory.
        min_8bit_size: parameters with fewer elements have 32-bit states.
        max_unorm: scale an update down to this many times the L2 norm of its parameter; 0 for no limit.
        skip_zeros: leave elements alone whose gradient is zero.
        args: an object whose attributes `optim_bits`, `min_8bit_size`, `max_unorm` and `skip_zeros` are used in place of these
            arguments. It is read at every step, and is the attribute `args` of the optimizer either way.
        capturable: count steps, and keep the learning rate, in tensors on the parameters' device, so that `step` can be captured
            in a CUDA graph, or traced by torch.compile; without it, a compiled function leaves the step to the interpreter. Change
            `param_groups[i]["lr"]` in place then. Take a step before capturing one, or compiling with `fullgraph=True`.

    Raises:
        InvalidArgumentError: an option has a value that is not accepted, or the class has no algorithm.
    """

    #: A key of `bnb_core.ops.spec.ALGORITHMS`.
    algorithm: ClassVar[str]
    #: Where each of the algorithm's states is kept.
    slots: ClassVar[Slots]
    #: Whether weight decay takes from the parameter directly, or adds to the gradient.
    decoupled_weight_decay: ClassVar[bool]
    #: How many "betas" there are, where that is an option.
    number_of_betas: ClassVar[int] = 2
    #: Options that bitsandbytes keeps as "betas", where the algorithm has none of that name.
    in_betas: ClassVar[Tuple[str, ...]] = ()

    def __init__(
        self,
        params: Any,
        defaults: Dict[str, Any],
        optim_bits: int = 32,
        is_paged: bool = False,
        *,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        args: Any = None,
        capturable: bool = False,
    ) -> None:
        if not hasattr(self.rules, "algorithm"):
            raise InvalidArgumentError(
                f"{type(self).__name__} has no algorithm; derive from a class that has, such as Adam, or from Optimizer1State or "
                "Optimizer2State, which take its name"
            )
        if args is None:
            general = (optim_bits, min_8bit_size, max_unorm, skip_zeros)
            args = MockArgs(dict(zip(GENERAL_OPTIONS, general)))
        missing = [name for name in GENERAL_OPTIONS if not hasattr(args, name)]
        if missing:
            raise InvalidArgumentError(f"args has no {', '.join(missing)}; it must have {', '.join(GENERAL_OPTIONS)}, or be None")
        self.args = args
        self.is_paged = is_paged
        self._plan: Optional[Plan] = None
        super().__init__(params, {**defaults, "capturable": capturable})

    @property
    def rules(self) -> "Type[Optimizer]":
        """The class that says what the algorithm's options are to the op, and where its states are kept."""
        return type(self)

    # ---------------------------------------------------------------------------------------------------------------- options

    def options(self, group: Mapping[str, Any], override: Override = None) -> Dict[str, Any]:
        """Return all options that hold for parameters of a group."""
        general = {name: getattr(self.args, name) for name in GENERAL_OPTIONS}
        return {**general, **group, **override} if override else {**general, **group}

    @classmethod
    def hyperparameters(cls, options: Mapping[str, Any]) -> Hyperparameters:
        """Translate options to what the op takes: those of the same name, and betas one by one."""
        fields: Dict[str, Any] = {name: kind(options[name]) for name, kind in _KINDS.items() if options.get(name) is not None}
        fields.update(zip(("beta1", "beta2", "beta3"), map(float, options.get("betas", ()))))
        return Hyperparameters(decoupled_weight_decay=cls.decoupled_weight_decay, **fields)

    @classmethod
    def slots_for(cls, hyperparameters: Hyperparameters) -> Slots:
        """Return the slots that are used, with None in the places of others."""
        needed = required_states(cls.algorithm, hyperparameters)
        return tuple(slot if need else None for slot, need in zip(cls.slots, needed))

    @classmethod
    def initial_value(cls, options: Mapping[str, Any]) -> float:
        """Return what the elements of a new state are."""
        return 0.0

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that have no meaning.

        Raises:
            InvalidArgumentError: naming the option, its value and what is accepted.
        """
        who = type(self).__name__
        for name in _NOT_NEGATIVE:
            value = options.get(name)
            if value is None or isinstance(value, torch.Tensor):  # to read a tensor may mean to wait for a device
                continue
            if not value >= 0.0:
                raise InvalidArgumentError(f"{who}: {name} is {value}; it must be at least 0")
        if "betas" in self.defaults:
            betas = options["betas"]
            if len(betas) != self.rules.number_of_betas or not all(0.0 <= beta < 1.0 for beta in betas):
                raise InvalidArgumentError(
                    f"{who}: betas are {betas}; there must be {self.rules.number_of_betas}, each at least 0 and below 1"
                )
        if options["optim_bits"] not in FORMATS:
            raise InvalidArgumentError(f"{who}: optim_bits is {options['optim_bits']}; it must be 32 or 8")

    def translate_override(self, override: Mapping[str, Any]) -> Dict[str, Any]:
        """Return options of `GlobalOptimManager` under the names that this algorithm has for them.

        Raises:
            InvalidArgumentError: an option that this algorithm does not have.
        """
        options = checkpoint.spread_betas(override, self.defaults, self.rules.in_betas)
        unknown = [name for name in options if name not in self.defaults and name not in GENERAL_OPTIONS]
        if unknown:
            known = ", ".join((*self.defaults, *GENERAL_OPTIONS))
            raise InvalidArgumentError(
                f"GlobalOptimManager sets {', '.join(unknown)} for a parameter of {type(self).__name__}, whose options are {known}"
            )
        return options

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        """Add parameters, with options of their own.

        Args:
            param_group: `"params"`, and any options.

        Raises:
            InvalidArgumentError: a value that is not accepted, or trainable parameters that are not float32, float16 or bfloat16.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check(self.options(group))
            for param in group["params"]:
                if param.requires_grad and param.dtype not in FLOAT_DTYPES:
                    raise InvalidArgumentError(
                        f"{type(self).__name__}: a parameter of shape {list(param.shape)} is {param.dtype}; "
                        "it must be torch.float32, torch.float16 or torch.bfloat16"
                    )
        except InvalidArgumentError:
            self.param_groups.pop()
            raise
        _keep_lr_on_device(group)

    # ------------------------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: computes the loss anew, with gradients, and returns it.

        Returns:
            What `closure` returned; None without one.

        Raises:
            InvalidArgumentError: a gradient is sparse or of another dtype than its parameter, or a parameter is expanded.
            CaptureError: a CUDA graph is being captured that would not do the same when it is replayed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Not the groups' own: torch.compile has them all say that they are capturable.
        if self.defaults["capturable"]:
            self._update()
        else:
            self._update_outside_graphs()
        return loss

    @_outside_graphs
    def _update_outside_graphs(self) -> None:
        # A graph would have the numbers of one step in it, and there would be another graph for each.
        self._update()

    def _update(self) -> None:
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if capturing:
            self._check_capturable()
        for group in self.param_groups:
            _keep_lr_on_device(group)
        plan = self._plan
        calls = plan.calls(self) if plan is not None else None
        if plan is None or calls is None:
            if capturing:
                raise CaptureError(
                    f"{type(self).__name__}.step: its states would be made within the graph, and anew at each replay; "
                    "take a step before the capture, with gradients for the same parameters"
                )
            plan = self._plan = self._make_plan()
            calls = plan.calls(self)
            assert calls is not None
        for step in plan.steps:
            step.add_(1.0)
        for call in calls:
            call.run(self.rules.algorithm)

    @_outside_graphs
    def _make_plan(self) -> Plan:
        return Plan(self)

    def _check_capturable(self) -> None:
        for group in self.param_groups:
            if not group["capturable"] or not isinstance(group["lr"], torch.Tensor):
                what = f"lr is the number {group['lr']}" if group["capturable"] else "capturable is False"
                raise CaptureError(
                    f"{type(self).__name__}.step: {what} while a CUDA graph is captured, which would keep the values of this step; "
                    "create the optimizer with capturable=True, and change lr in place"
                )

    # ------------------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> Dict[str, Any]:
        """Return states and options, in a form that bitsandbytes can load too."""
        saved = super().state_dict()
        limits = {
            index: self.options(group)["max_unorm"]
            for group, packed in zip(self.param_groups, saved["param_groups"])
            for index in packed["params"]
        }
        saved["state"] = {key: checkpoint.save_state(state, limits.get(key, 0.0)) for key, state in saved["state"].items()}
        saved["param_groups"] = [checkpoint.save_group(group, self.rules.in_betas) for group in saved["param_groups"]]
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        """Load what `state_dict` returned, here or in bitsandbytes.

        States keep the format that they were saved in. Options that the checkpoint does not have stay as they are, and so does
        `capturable`.

        Args:
            state_dict: a checkpoint of the same algorithm and model. It is not changed.
            move_to_device: put states where their parameters are now; otherwise at the next step.

        Raises:
            CheckpointError: states that do not fit the parameters.
            ValueError: other numbers of parameters.
        """
        loaded = dict(state_dict)
        loaded["state"] = {key: checkpoint.load_state(state, move_to_device) for key, state in state_dict["state"].items()}
        loaded["param_groups"] = [
            checkpoint.load_group(saved, current, self.defaults, self.rules.in_betas)
            for saved, current in zip(state_dict["param_groups"], self.param_groups)
        ] + list(state_dict["param_groups"][len(self.param_groups) :])  # too many, which is found below
        super().load_state_dict(loaded)

    def __getstate__(self) -> Dict[str, Any]:
        return {**super().__getstate__(), "args": self.args, "is_paged": self.is_paged}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Take over what was loaded, unpickled or copied: check it, and have tensors shared again that were."""
        super().__setstate__(state)
        self._plan = None
        always = required_states(self.rules.algorithm, Hyperparameters())
        stepped = []
        for group in self.param_groups:
            _keep_lr_on_device(group)
            for param in group["params"]:
                if not self.state.get(param):
                    continue
                values = self.state[param]
                checkpoint.settle_state(values, param)
                adapt(values, self.rules.slots, param)
                format = format_of(values) or FORMATS[32]
                for slot, required in zip(self.rules.slots, always):
                    if slot is not None and (required or slot.key in values):
                        format.check(values, slot, param)
                stepped.append((values, param.device if group["capturable"] else None))
        share_steps(stepped, self.state.values())


def _keep_lr_on_device(group: Dict[str, Any]) -> None:
    """Have the learning rate of a capturable group in a tensor where its parameters are. A scheduler may put a number there."""
    if group["capturable"] and group["params"]:
        lr, device = group["lr"], group["params"][0].device
        if not isinstance(lr, torch.Tensor):
            group["lr"] = torch.tensor(float(lr), dtype=torch.float32, device=device)
        elif lr.device != device or lr.dtype != torch.float32 or lr.dim():
            group["lr"] = lr.detach().to(device, torch.float32).reshape(())


#: bitsandbytes' name for the base of all optimizers.
Optimizer8bit = Optimizer

#: What bitsandbytes has in its module of this name besides, and where it is here. Some of it is built on this module.
_ELSEWHERE = {"GlobalOptimManager": "manager", "Optimizer1State": "by_name", "Optimizer2State": "by_name"}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"bnb_core.optim.{_ELSEWHERE[name]}"), name)
