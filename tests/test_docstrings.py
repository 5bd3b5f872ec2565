"""Examples in docstrings are run, and every public name has a docstring."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import minicpm_lite

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(minicpm_lite.__path__, "minicpm_lite.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for public in getattr(module, "__all__", []):
        member = getattr(module, public)
        if inspect.isclass(member) or inspect.isfunction(member):
            assert inspect.getdoc(member), f"{name}.{public} has no docstring"
