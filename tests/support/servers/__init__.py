"""Private servers for tests: real ones, on free ports, in folders of their own, to be killed and started again.

`servers.fixtures` is what tests ask for. Shared, for tests that do no harm: ``redis_url`` (an empty database) of
``redis_server``, ``rabbitmq_url`` (a fresh vhost) of ``rabbitmq``. For one test alone: ``make_redis``, ``make_rabbitmq``,
``redis_cluster``, ``redis_sentinel``, and ``make_proxy``, whose `Proxy` stands between worker and server and breaks what
passes through it. A server whose program is missing skips the test, or fails it where ``CI=true``; `make services` brings it.
"""
