import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def new_lab():
    spec = importlib.util.spec_from_file_location("weightwire_lab", Path(__file__).with_name("lab.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def labs(*modules):
        lab = module.Lab(*modules)
        yield lab
        lab.close()

    return labs


@pytest.fixture(scope="session")
def lab(new_lab):
    yield from new_lab()
