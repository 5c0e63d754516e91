"""The tests that every backend must pass.

Run them with `pytest --pyargs bnb_core.testing.conformance --bnb-backend NAME`, or keep them in a backend's own tests with one
line:

    from bnb_core.testing.conformance import *  # noqa: F403

Each takes the fixture `bnb_kernel` for one op and one dtype (see `bnb_core.testing.subject`). An op that the backend does not
declare is skipped; one that it declares must run, and give what `bnb_core.testing.expectations` says.
"""

from bnb_core.testing.conformance.test_blockwise import *  # noqa: F403
from bnb_core.testing.conformance.test_embedding import *  # noqa: F403
from bnb_core.testing.conformance.test_every_op import *  # noqa: F403
from bnb_core.testing.conformance.test_four_bit import *  # noqa: F403
from bnb_core.testing.conformance.test_int8 import *  # noqa: F403
from bnb_core.testing.conformance.test_optimizer import *  # noqa: F403
from bnb_core.testing.conformance.test_product import *  # noqa: F403
from bnb_core.testing.conformance.test_random import *  # noqa: F403

__all__ = sorted(name for name, value in list(globals().items()) if name.startswith("test_") and callable(value))
