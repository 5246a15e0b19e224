"""The laws of each port, as test classes: a driver's whole contract test is one subclass with one factory fixture.

.. code-block:: python

    class TestSqliteTransport(TransportContract):
        @pytest.fixture
        def make_transport(self, tmp_path):
            return lambda: SqliteTransport(f"sqlite:///{tmp_path}/queue.sqlite3")

Each call of the factory makes another instance over the *same* backend, so that two instances are two machines; for
serializers, compressors and pools, a fresh one. The capabilities that the driver declares decide: what is declared is
tested, and of what is not, the clean refusal. Each law runs on an event loop in a thread of its own and has a time limit;
no pytest plugin for asyncio is needed. Class attributes, described with each contract, fit the kit to slow brokers.
"""

from umbel.testing.contracts.compressor import CompressorContract
from umbel.testing.contracts.pool import PoolContract
from umbel.testing.contracts.result_store import ResultStoreContract
from umbel.testing.contracts.scheduler import SchedulerContract
from umbel.testing.contracts.serializer import SerializerContract
from umbel.testing.contracts.transport import TransportContract

__all__ = [
    "CompressorContract",
    "PoolContract",
    "ResultStoreContract",
    "SchedulerContract",
    "SerializerContract",
    "TransportContract",
]
