import importlib
import subprocess
import sys

import pytest

import kedge


def test_public_names_are_curated():
    assert kedge.__all__ == sorted(kedge.__all__, key=lambda name: (name[0].islower(), name))
    assert set(kedge.__all__) == kedge._SUBMODULES | set(kedge._HOMES)
    for name in kedge.__all__:
        assert getattr(kedge, name) is not None
        assert name in dir(kedge)
    for name, home in kedge._HOMES.items():
        assert getattr(kedge, name) is getattr(importlib.import_module(home), name)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = kedge.nonsense


def test_import_loads_neither_grpc_nor_numpy():
    code = "import sys, kedge; print(sorted({'grpc', 'numpy', 'jax', 'google.protobuf'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_fake_server_needs_no_grpc():
    code = "import sys, kedge; kedge.testing.FakeServer().connect(); print('grpc' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_address_comes_from_the_environment(monkeypatch):
    with kedge.testing.FakeServer() as server:
        monkeypatch.setenv("KEDGE_ADDRESS", server.address)
        assert kedge.connect().list_runs() == []


def test_missing_address_says_how_to_give_one(monkeypatch):
    monkeypatch.delenv("KEDGE_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="KEDGE_ADDRESS"):
        kedge.connect()
