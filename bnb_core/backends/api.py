"""What a backend is made of: a name, and a table of kernels keyed by op. Nothing here looks for backends or chooses one."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, Dict, FrozenSet, Iterable, Mapping, Optional, Tuple, Union

from bnb_core.errors import BackendDefinitionError, BackendIncompatibleError
from bnb_core.ops.spec import API_VERSION, OPS, OpSpec

if TYPE_CHECKING:
    import torch

#: Stands for every torch device type in a kernel's `devices`.
ANY_DEVICE = "*"


@dataclass(frozen=True)
class Support:
    """Whether something can run here, and if not, why.

    Raises:
        BackendDefinitionError: it is a refusal without a reason, which would leave users guessing.
    """

    ok: bool
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.ok and not self.reason:
            raise BackendDefinitionError("a refusal needs a reason: Support(False, 'why not')")

    def __bool__(self) -> bool:
        return self.ok


#: The answer of a backend that needs nothing in particular.
YES = Support(True)


class Call:
    """The arguments of one call, by the op's parameter names, for a kernel's `when` and `scratch`.

    Tensors are the real ones: read their shape, strides, dtype and device, never their values, which would synchronize.
    """

    __slots__ = ("_args", "_positions")

    def __init__(self, spec: OpSpec, args: Tuple[Any, ...]) -> None:
        self._positions = _positions(spec)
        self._args = args

    def __getattr__(self, name: str) -> Any:
        try:
            return self._args[self._positions[name]]
        except KeyError:
            raise AttributeError(f"the op has no parameter {name!r}; it has {', '.join(self._positions)}") from None


#: By op, for the spec that is given: to hash a spec takes longer than the call.
_known_positions: Dict[str, Tuple[OpSpec, Dict[str, int]]] = {}


def _positions(spec: OpSpec) -> Dict[str, int]:
    known = _known_positions.get(spec.name)
    if known is None or known[0] is not spec:
        known = _known_positions[spec.name] = spec, {parameter.name: at for at, parameter in enumerate(spec.parameters)}
    return known[1]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One backend's function for one op, with what it accepts."""

    backend: "Backend"
    op: OpSpec
    function: Callable[..., None]
    arity: int
    """Positional arguments that the function takes: the op's without `shape` and `dtype`, as of the backend's API version."""
    devices: FrozenSet[str]
    dtypes: FrozenSet[str]
    when: Optional[Callable[[Call], Support]] = None
    scratch: Optional[Callable[[Call], int]] = None

    @property
    def unconditional(self) -> bool:
        """Whether the kernel runs every call on its devices and dtypes, so that `refusal_of` need not be asked."""
        return self.when is None and all(parameter.since <= self.backend.api_version for parameter in self.op.parameters)

    def runs_on(self, device_type: str) -> bool:
        """Say whether the kernel takes tensors of this device type."""
        return device_type in self.devices or ANY_DEVICE in self.devices

    def refusal(self, device_type: str, dtype: str) -> str:
        """Say why the kernel never runs on this device type and dtype (its name, such as `"float32"`); empty if it may."""
        if not self.runs_on(device_type):
            return f"{device_type} not in {sorted(self.devices)}"
        if dtype not in self.dtypes:
            return f"torch.{dtype} not in {['torch.' + name for name in sorted(self.dtypes)]}"
        return ""

    def refusal_of(self, call: Call) -> str:
        """Say why the kernel does not run this one call; empty if it does."""
        for parameter in self.op.parameters:
            if parameter.since > self.backend.api_version and getattr(call, parameter.name) != parameter.default:
                return f"written for a backend API without {parameter.name!r}"
        if self.when is None:
            return ""
        support = self.when(call)
        if not isinstance(support, Support):
            raise BackendDefinitionError(
                f"`when` of {self.op.name!r} in backend {self.backend.name!r} returned {support!r}; "
                "it must return YES or Support(False, reason)"
            )
        return "" if support else support.reason


class Backend:
    """A named set of kernels.

    A backend implements as many ops as it likes; another runs the rest. Creating one must be cheap: no device context, no large
    import. Everything that is slow or may fail belongs in `available` or in the kernels.

    Args:
        name: lower-case identifier that users select the backend by, such as `"neon"`.
        api_version: (major, minor) of the backend API that the backend is written for. An equal major and an equal or older minor
            than `bnb_core.backends.API_VERSION` fits.
        priority: where no backend is selected, the available one with the highest priority runs first. `reference` has 0.
        available: asked once, before the first kernel runs; returns `YES`, or a `Support` with the reason why not.
        description: one line for `bnb doctor`, such as the name of the device; may be a function, called only there.

    Raises:
        BackendDefinitionError: the name is not a lower-case identifier, or the version is not a pair of numbers.
        BackendIncompatibleError: this bnb_core does not provide that API version.
    """

    def __init__(
        self,
        name: str,
        *,
        api_version: Tuple[int, int],
        priority: int = 0,
        available: Callable[[], Support] = lambda: YES,
        description: Union[str, Callable[[], str]] = "",
    ) -> None:
        if not is_backend_name(name):
            raise BackendDefinitionError(f"backend name {name!r} is not a lower-case identifier; choose one such as 'acme'")
        if not (isinstance(api_version, tuple) and len(api_version) == 2 and all(isinstance(part, int) for part in api_version)):
            raise BackendDefinitionError(f"api_version of backend {name!r} is {api_version!r}; it must be a pair such as (1, 0)")
        # Before anything else: what else is passed, here and to `kernel`, has the meaning of that API version.
        mismatch = incompatibility(api_version, f"the package of backend {name!r}")
        if mismatch:
            raise BackendIncompatibleError(f"backend {name!r} is {mismatch}", api_version)
        self.name = name
        self.api_version = api_version
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
        return MappingProxyType(self._kernels)

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
            BackendDefinitionError: no such op, a dtype that the op does not have, no device or dtype at all, a second kernel for
                the op, or a function whose parameters differ from the spec's.
        """
        spec = _find_spec(op, self)
        if op in self._kernels:
            raise BackendDefinitionError(f"backend {self.name!r} has two kernels for {op!r}; keep one")
        device_types = _check_devices(devices, op)
        dtype_names = _check_dtypes(dtypes, spec)

        def register(function: Callable[..., None]) -> Callable[..., None]:
            _check_signature(function, spec, self.api_version, scratch is not None)
            arity = len(spec.kernel_parameters(self.api_version))
            self._kernels[op] = Kernel(self, spec, function, arity, device_types, dtype_names, when, scratch)
            return function

        return register

    def covers(self, device_type: str) -> bool:
        """Say whether any kernel takes tensors of this device type."""
        return any(kernel.runs_on(device_type) for kernel in self._kernels.values())


def is_backend_name(name: Any) -> bool:
    """Say whether a backend may have this name."""
    return isinstance(name, str) and name.isidentifier() and name == name.lower()


def incompatibility(api_version: Tuple[int, int], package: str) -> str:
    """Say why a backend of `package`, written for `api_version`, does not fit, and what to upgrade; empty if it fits."""
    if api_version[0] == API_VERSION[0] and api_version[1] <= API_VERSION[1]:
        return ""
    outdated = "bnb-core" if api_version > API_VERSION else package
    return "written for backend API {}.{}, this bnb_core provides {}.{}; upgrade {}".format(*api_version, *API_VERSION, outdated)


def dtype_name(dtype: Any) -> str:
    """Name a torch dtype as specs do: `"float32"`."""
    return str(dtype).replace("torch.", "")


def _find_spec(op: str, backend: Backend) -> OpSpec:
    if op not in OPS:
        close = difflib.get_close_matches(op, OPS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the ops are {', '.join(OPS)}"
        raise BackendDefinitionError(f"backend {backend.name!r}: no op named {op!r}; {hint}")
    spec = OPS[op]
    if spec.since > backend.api_version:
        since = "({}, {})".format(*spec.since)
        raise BackendDefinitionError(f"backend {backend.name!r}: op {op!r} needs api_version={since}; declare that")
    return spec


def _check_devices(devices: Iterable[str], op: str) -> FrozenSet[str]:
    if isinstance(devices, str) or not devices:
        raise BackendDefinitionError(f"kernel for {op!r} has devices={devices!r}; pass a set of device types, such as {{'cpu'}}")
    return frozenset(devices)


def _check_dtypes(dtypes: "Iterable[torch.dtype]", spec: OpSpec) -> FrozenSet[str]:
    names = frozenset(map(dtype_name, dtypes))
    unknown = sorted(names - set(spec.dtypes))
    if unknown or not names:
        declared = ", ".join(unknown) or "no dtype"
        raise BackendDefinitionError(f"kernel for {spec.name!r} declares {declared}; the op has {', '.join(spec.dtypes)}")
    return names


def _check_signature(function: Callable[..., None], spec: OpSpec, api_version: Tuple[int, int], has_scratch: bool) -> None:
    positional = spec.kernel_parameters(api_version)
    keywords = (("out",) if spec.outputs else ()) + (("scratch",) if has_scratch else ())
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise BackendDefinitionError(
            f"the signature of {function!r} for {spec.name!r} cannot be read; wrap it in a Python function"
        ) from error
    parameters = signature.parameters.values()
    given_positional = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    given_keywords = sorted(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    variadic = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    if given_positional != positional or given_keywords != sorted(keywords) or variadic:
        expected = ", ".join(positional + (("*",) + keywords if keywords else ()))
        raise BackendDefinitionError(
            f"kernel for {spec.name!r} has parameters that differ from the op's: "
            f"{spec.name}{signature}, expected {spec.name}({expected})"
        )
