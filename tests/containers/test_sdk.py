"""The SDK's suite against a container: every test that `tests/client/test_end_to_end.py` has, now and later.

`target` and `backend` are the container's here (see `conftest.py`); the tests are the same.
"""

from __future__ import annotations

from tests.client import test_end_to_end as suite
from tests.end_to_end import test_results as results

client = suite.client
globals().update({name: test for name, test in vars(suite).items() if name.startswith("test_")})
globals().update({name: test for name, test in vars(results).items() if "test_the_worked_example" in name})
