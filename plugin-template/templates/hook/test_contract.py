"""What Umbel wants of a listener: its hooks exist, and are called by the names of their arguments."""

import logging

import pytest

from umbel.model import Action, Delivery, Message, Outcome, Settlement, Verdict
from umbel.plugins.manager import PluginManager
from {{ cookiecutter.__package }}.hook import {{ cookiecutter.__class }}


def test_it_counts_and_tells(caplog: pytest.LogCaptureFixture) -> None:
    listener, plugins = {{ cookiecutter.__class }}(), PluginManager()
    plugins.register(listener, "{{ cookiecutter.name }}")
    settled = plugins.observer("umbel_task_settled")
    delivery = Delivery(message=Message(queue="default"), queue="default", token=None)
    for verdict in (Verdict.SUCCESS, Verdict.FAILURE, Verdict.SUCCESS):
        settled(settlement=Settlement(delivery=delivery, action=Action.ACK), outcome=Outcome(verdict=verdict))
    assert listener.ends == {"success": 2, "failure": 1}
    with caplog.at_level(logging.INFO):
        plugins.observer("umbel_worker_stopped")(worker=None)
    assert caplog.messages == ["{{ cookiecutter.name }}: settled 2 success, 1 failure"]


def test_a_worker_that_did_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        {{ cookiecutter.__class }}().umbel_worker_stopped()
    assert caplog.messages == ["{{ cookiecutter.name }}: settled nothing"]


def test_the_settings_name_it() -> None:
    plugins = PluginManager()
    plugins.load_hooks(["{{ cookiecutter.name }}"])
    assert isinstance(dict(plugins.registered())["{{ cookiecutter.name }}"], {{ cookiecutter.__class }})
