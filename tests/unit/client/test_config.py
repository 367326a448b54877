"""What is shown to a server, from arguments and the environment, and where a token may go."""

import pytest

from kedge.config import (
    Place,
    check_token_stays_secret,
    is_on_this_host,
    places,
    resolve_credentials,
)

VARIABLES = ("KEDGE_TOKEN_FILE", "KEDGE_CA_FILE", "KEDGE_CERT_FILE", "KEDGE_KEY_FILE", "KEDGE_SERVER_NAME")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_nothing_is_given():
    sources = resolve_credentials()
    assert (sources.is_secure, sources.has_token) == (False, False)


def test_the_environment_gives_what_is_not_given(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, f"of-{name}")
    sources = resolve_credentials(ca_file="given", token="kedge_t")
    assert str(sources.ca_file) == "given"
    assert (sources.token, sources.token_file) == ("kedge_t", None), "a token that is given stands for a file's"
    assert str(sources.cert_file) == "of-KEDGE_CERT_FILE"
    assert sources.server_name == "of-KEDGE_SERVER_NAME"
    own = resolve_credentials(cert_file="c", key_file="k")
    assert (str(own.cert_file), str(own.key_file)) == ("c", "k")


def test_a_variable_that_is_empty_is_none(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    assert resolve_credentials() == resolve_credentials(token_file=None)
    assert not resolve_credentials().is_secure


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token": "a", "token_file": "f"}, "give one of them"),
        ({"token": ""}, "token is empty"),
        ({"ca_file": ""}, "ca_file is empty"),
        ({"token": "two words"}, "token holds no token"),
        ({"token": "line\n"}, "token holds no token"),
        ({"token": "schlüssel"}, "token holds no token"),
        ({"cert_file": "c"}, "needs key_file"),
        ({"key_file": "k"}, "needs cert_file"),
        ({"server_name": "n"}, "give ca_file"),
    ],
)
def test_what_is_not_whole_is_refused(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        resolve_credentials(**given)
    assert "two words" not in str(caught.value)
    assert "schlüssel" not in str(caught.value)


def test_no_token_is_in_a_repr():
    assert "kedge_secret" not in repr(resolve_credentials(token="kedge_secret"))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("localhost:5", [Place("localhost", 5)]),
        ("[::1]:5", [Place("::1", 5)]),
        ("dns:///host:5", [Place("host", 5)]),
        ("dns:host", [Place("host", 443)]),
        ("dns://8.8.8.8/host:5", []),
        ("ipv4:10.0.0.1:5,127.0.0.1:6", [Place("10.0.0.1", 5), Place("127.0.0.1", 6)]),
        ("ipv6:[::1]:5", [Place("::1", 5)]),
        ("unix:/run/kedge.sock", [Place("", 0, "/run/kedge.sock")]),
        ("unix:///run/kedge.sock", [Place("", 0, "/run/kedge.sock")]),
        ("unix-abstract:kedge", [Place("", 0, "\0kedge")]),
        ("xds:///service", []),
    ],
)
def test_where_an_address_leads(address, expected):
    assert places(address) == expected


@pytest.mark.parametrize(
    "address", ["localhost:1", "LOCALHOST.:1", "127.8.9.10:1", "[::1]:1", "unix:/s", "ipv4:127.0.0.1:1,127.0.0.2:1"]
)
def test_what_stays_on_this_host(address):
    assert is_on_this_host(address)
    check_token_stays_secret(address, resolve_credentials(token="t"))


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1:1",
        "0.0.0.0:1",
        "localhost.example:1",
        "xds:///s",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "dns://8.8.8.8/localhost:1",
    ],
)
def test_what_does_not_gets_a_token_over_tls_only(address):
    assert not is_on_this_host(address)
    with pytest.raises(ValueError, match="unencrypted"):
        check_token_stays_secret(address, resolve_credentials(token="t"))
    with pytest.raises(ValueError, match="unencrypted"):
        check_token_stays_secret(address, resolve_credentials(token_file="f"))
    check_token_stays_secret(address, resolve_credentials(token="t", ca_file="system"))
    check_token_stays_secret(address, resolve_credentials())
