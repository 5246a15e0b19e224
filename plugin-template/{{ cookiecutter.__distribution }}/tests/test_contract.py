{% include cookiecutter.port + "/test_contract.py" %}
