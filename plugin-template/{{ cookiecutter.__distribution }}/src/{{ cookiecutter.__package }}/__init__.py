"""{{ cookiecutter.__summary }}."""
