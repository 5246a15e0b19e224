{% include cookiecutter.port + "/plugin.py" %}
