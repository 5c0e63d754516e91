"""What a backend is made of: a name, and a table of kernels keyed by op. Nothing here looks for backends or chooses one."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Dict, FrozenSet, Iterable, Mapping, Optional, Tuple

from bnb_core.errors import BackendDefinitionError
from bnb_core.ops.spec import API_VERSION, OPS, OpSpec

if TYPE_CHECKING:
    import torch

#: Stands for every torch device type in a kernel's `devices`.
ANY_DEVICE = "*"


@dataclass(frozen=True)
class Support:
    """Whether something can run here, and if not, why."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


#: The answer of a backend that needs nothing in particular.
YES = Support(True)


class Call:
    """The arguments of one call, by the op's parameter names, for a kernel's `when` and `scratch`.

    Tensors are the real ones: read their shape, strides, dtype and device, never their values, which would synchronize.
    """

    __slots__ = ("_arguments",)

    def __init__(self, spec: OpSpec, args: Tuple[Any, ...]) -> None:
        self._arguments = {parameter.name: value for parameter, value in zip(spec.parameters, args)}

    def __getattr__(self, name: str) -> Any:
        try:
            return self._arguments[name]
        except KeyError:
            raise AttributeError(f"the op has no parameter {name!r}; it has {', '.join(self._arguments)}") from None


@dataclass(frozen=True, eq=False)
class Kernel:
    """One backend's function for one op, with what it accepts."""

    backend: "Backend"
    op: OpSpec
    function: Callable[..., None]
    devices: FrozenSet[str]
    dtypes: FrozenSet[str]
    when: Optional[Callable[[Call], Support]] = None
    scratch: Optional[Callable[[Call], int]] = None

    def runs_on(self, device_type: str) -> bool:
        """Say whether the kernel takes tensors of this device type."""
        return device_type in self.devices or ANY_DEVICE in self.devices

    def refusal(self, device_type: str, dtype: "torch.dtype") -> Optional[str]:
        """Say why the kernel never runs on this device type and dtype; None if it may."""
        if not self.runs_on(device_type):
            return f"{device_type} not in {sorted(self.devices)}"
        if _dtype_name(dtype) not in self.dtypes:
            return f"{dtype} not in {['torch.' + name for name in sorted(self.dtypes)]}"
        return None


class Backend:
    """A named set of kernels.

    A backend implements as many ops as it likes; another runs the rest. Creating one must be cheap: no device context, no large
    import. Everything that is slow or may fail belongs in `available` or in the kernels.

    Args:
        name: lower-case identifier that users select the backend by, such as `"neon"`.
        api_version: (major, minor) of the backend API that the backend is written for.
        priority: where no backend is selected, the available one with the highest priority runs first. `reference` has 0.
        available: asked once, before the first kernel runs; returns `YES`, or a `Support` with the reason why not.
        description: one line for `bnb doctor`, such as the name of the device; may be a function, called only there.

    Raises:
        BackendDefinitionError: the name is not a lower-case identifier.
    """

    def __init__(
        self,
        name: str,
        *,
        api_version: Tuple[int, int],
        priority: int = 0,
        available: Callable[[], Support] = lambda: YES,
        description: "str | Callable[[], str]" = "",
    ) -> None:
        if not (isinstance(name, str) and name.isidentifier() and name == name.lower()):
            raise BackendDefinitionError(f"backend name {name!r} is not a lower-case identifier; choose one such as 'acme'")
        self.name = name
        self.api_version: Tuple[int, int] = (api_version[0], api_version[1])
        self.priority = priority
        self.available = available
        self._description = description
        self._kernels: Dict[str, Kernel] = {}

    def __repr__(self) -> str:
        return f"<Backend {self.name!r}: {len(self._kernels)} of {len(OPS)} ops>"

    def __reduce__(self) -> Tuple[Any, ...]:
        # Kernels may hold native handles, and the process that unpickles has its own: only the name travels.
        from bnb_core.backends.selection import get_backend

        return get_backend, (self.name,)

    @property
    def description(self) -> str:
        """One line about the backend on this machine."""
        return self._description() if callable(self._description) else self._description

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        """The kernels by op name."""
        return dict(self._kernels)

    @property
    def compatible(self) -> Support:
        """Whether this bnb_core provides the API that the backend is written for."""
        major, minor = self.api_version
        if (major, minor) == API_VERSION or (major == API_VERSION[0] and minor < API_VERSION[1]):
            return YES
        wants, has = f"{major}.{minor}", "{}.{}".format(*API_VERSION)
        remedy = "upgrade bnb-core" if (major, minor) > API_VERSION else f"upgrade the package that provides {self.name!r}"
        return Support(False, f"written for backend API {wants}, this bnb_core provides {has}; {remedy}")

    def kernel(
        self,
        op: str,
        *,
        devices: Iterable[str],
        dtypes: "Iterable[torch.dtype]",
        when: Optional[Callable[[Call], Support]] = None,
        scratch: Optional[Callable[[Call], int]] = None,
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Register the decorated function as this backend's kernel for `op`.

        The function takes the op's parameters under their names, in order, except those that only shape the output (`shape`,
        `dtype`), and fills `out`: a tensor, or a tuple of tensors where the op has several outputs. It returns nothing and
        allocates nothing. Tensors are contiguous, on one device, of checked shape and dtype, and not empty.

        Args:
            op: name of an op of `bnb_core.ops.spec.OPS`.
            devices: torch device types that the kernel takes, such as `{"cpu"}`; `{"*"}` for all.
            dtypes: the dtypes that it takes, of the argument that the op's spec names (`dispatch`, `dispatch_dtype`).
            when: called with each `Call` before it runs; returns a `Support`, so that a kernel can refuse a shape or a blocksize
                with a reason. Leave it out where nothing is refused: such kernels are found faster.
            scratch: bytes of temporary memory that the kernel needs for a `Call`; they are passed as `scratch`, uint8 [bytes].

        Raises:
            BackendDefinitionError: no such op, a dtype that the op does not have, a second kernel for the op, or a function whose
                parameters differ from the spec's.
        """

        def register(function: Callable[..., None]) -> Callable[..., None]:
            if self.compatible:  # a kernel for another API version cannot be judged by this one's specs, and will not run
                spec = _find_spec(op, self.name)
                if op in self._kernels:
                    raise BackendDefinitionError(f"backend {self.name!r} has two kernels for {op!r}; keep one")
                _check_signature(function, spec, self.api_version, scratch is not None)
                names = _check_dtypes(dtypes, spec)
                self._kernels[op] = Kernel(self, spec, function, frozenset(devices), names, when, scratch)
            return function

        return register

    def covers(self, device_type: str) -> bool:
        """Say whether any kernel takes tensors of this device type."""
        return any(kernel.runs_on(device_type) for kernel in self._kernels.values())


def _dtype_name(dtype: Any) -> str:
    return str(dtype).replace("torch.", "")


def _find_spec(op: str, backend: str) -> OpSpec:
    try:
        return OPS[op]
    except KeyError:
        close = difflib.get_close_matches(op, OPS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the ops are {', '.join(OPS)}"
        raise BackendDefinitionError(f"backend {backend!r}: no op named {op!r}; {hint}") from None


def _check_dtypes(dtypes: "Iterable[torch.dtype]", spec: OpSpec) -> FrozenSet[str]:
    names = frozenset(_dtype_name(dtype) for dtype in dtypes)
    unknown = sorted(names - set(spec.dtypes))
    if unknown:
        raise BackendDefinitionError(f"kernel for {spec.name!r} declares {', '.join(unknown)}; the op has {', '.join(spec.dtypes)}")
    return names


def _check_signature(function: Callable[..., None], spec: OpSpec, api_version: Tuple[int, int], has_scratch: bool) -> None:
    expected = spec.kernel_parameters(api_version)
    expected_keywords = (("out",) if spec.outputs else ()) + (("scratch",) if has_scratch else ())
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise BackendDefinitionError(
            f"the signature of {function!r} for {spec.name!r} cannot be read; wrap it in a Python function"
        ) from error
    positional = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    keywords = tuple(sorted(p.name for p in parameters if p.kind is p.KEYWORD_ONLY))
    if positional != expected or keywords != tuple(sorted(expected_keywords)):
        wanted = ", ".join(expected + (("*",) + expected_keywords if expected_keywords else ()))
        raise BackendDefinitionError(
            f"kernel for {spec.name!r} has parameters that differ from the op's: "
            f"{spec.name}{inspect.signature(function)}, expected {spec.name}({wanted})"
        )
