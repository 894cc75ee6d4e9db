"""Global arrays: which of their rows are a host's own."""

import numpy as np

from copg_jax import distributed, sharding
from tests.toys import mesh


def test_host_rows_are_those_of_the_host_s_own_devices():
    on = mesh(1, 4, 2)
    x = np.arange(16).reshape(8, 2)
    np.testing.assert_array_equal(distributed.host_rows(x, sharding.batch_sharding(on)), x)

    class Second:
        """A host whose devices hold the second and the last quarter, in two copies."""

        def addressable_devices_indices_map(self, shape):
            return dict(enumerate([(slice(6, 8),), (slice(2, 4),)] * 2))

    np.testing.assert_array_equal(distributed.host_rows(x, Second()), x[[2, 3, 6, 7]])
