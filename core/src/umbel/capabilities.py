"""What a driver says it can do.

Every driver carries one frozen value of its port's class as ``capabilities``. The conformance kit tests
what is declared and tests the clean refusal of what is not; the kernel emulates what is missing by a
documented means or refuses with one sentence that names the setting. Nothing degrades silently.
"""

from __future__ import annotations

import math

from attrs import frozen

UNLIMITED = math.inf


@frozen(kw_only=True)
class TransportCapabilities:
    """What a broker keeps."""

    durable: bool = False
    """An accepted message survives the death of every process, the broker's own included."""
    confirm: bool = False
    """``publish`` returns only after the broker has taken responsibility for every message."""
    max_delay: float = 0.0
    """Longest delay in seconds that the broker keeps itself; 0: none, ``UNLIMITED``: any."""
    priority_levels: int = 1
    """Distinct priorities that are kept apart, on every server that it runs on; 1: none is promised."""
    renewable_lease: bool = False
    """A delivery is held under a lease that ``renew`` extends; False: for as long as the session lives."""
    delivery_count: bool = False
    """``Delivery.count`` is exact; False: it is 1, or 2 for a redelivery."""
    start_marks: bool = False
    """``renew(…, starting=True)`` records durably that work begins, so that a crash is blamed on the right task."""
    exchanges: bool = False
    """Queues can be bound to named exchanges, and messages be published to them."""
    broadcast: bool = False
    """The driver is a ``Broadcaster`` too."""
    blocking_publish: bool = False
    """The driver is a ``BlockingPublisher`` too."""
    max_message_size: int | None = None
    """Largest body in bytes; None: not limited by the driver."""


@frozen(kw_only=True)
class ResultStoreCapabilities:
    """What a result store keeps."""

    durable: bool = False
    """A stored result survives the death of every process."""
    push: bool = False
    """``wait`` learns of a result at once; False: by polling."""
    expires: bool = False
    """Records are removed after their ``expires``."""
    join: bool = False
    """The driver is a ``JoinStore`` too: groups and chords are possible."""
    claim: bool = False
    """The driver is a ``ClaimStore`` too: unique tasks, locks, fleet-wide limits are possible."""
    query: bool = False
    """The driver is a ``QueryableStore`` too."""


@frozen(kw_only=True)
class PoolCapabilities:
    """What an execution pool can do to a running task."""

    soft_limit: bool = False
    """Can raise ``SoftTimeLimitExceeded`` inside a running task."""
    hard_limit: bool = False
    """Can end a running task that does not answer."""
    cancel_running: bool = False
    """Can cancel exactly the task asked for while it runs, never another."""
    recycle: bool = False
    """Can replace its children after a number of tasks or an amount of memory."""
    resize: bool = False
    """The number of slots can change while it runs."""
    isolated: bool = False
    """A task that crashes or leaks takes only its own child along."""
    main_thread: bool = False
    """Runs user code on the main thread: the worker calls ``run_main_thread`` there."""
    slots_per_cpu: int = 1
    """Slots for each processor where ``[worker] concurrency`` says nothing."""


@frozen(kw_only=True)
class SchedulerCapabilities:
    """What a store of periodic entries keeps."""

    durable: bool = False
    """Entries and their last runs survive the death of every process."""
    shared: bool = False
    """Any number of schedulers may use it at once; one leads by a fenced lease."""
