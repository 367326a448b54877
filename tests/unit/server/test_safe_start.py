"""Beyond loopback a server starts only if its callers are known and nobody listens in, or if it is told to."""

import itertools
import re

import pytest

from kedge_server.app import require_safe
from kedge_server.config import ConfigError, ServerConfig

TLS = {"cert_file": "server.pem", "key_file": "server-key.pem"}
LOOPBACK = ["127.0.0.1:0", "localhost:50051", "[::1]:0", "127.8.9.1:1"]
BEYOND = ["0.0.0.0:0", "[::]:50051", "192.168.1.4:0", "kedge.example.org:0"]


def config(listen: str, *, tls: bool, tokens: bool, cas: bool, insecure: bool = False) -> ServerConfig:
    return ServerConfig.model_validate(
        {
            "server": {"listen": listen, "insecure": insecure},
            "tls": (TLS if tls else {}) | ({"client_ca_file": "ca.pem"} if cas else {}),
            "access": {"tokens_file": "tokens"} if tokens else {},
        }
    )


WAYS = [way for way in itertools.product([False, True], repeat=3) if way[0] or not way[2]]


@pytest.mark.parametrize(("tls", "tokens", "cas"), WAYS)
@pytest.mark.parametrize("listen", BEYOND)
def test_beyond_loopback_it_wants_tls_and_callers_that_are_known(
    listen: str, tls: bool, tokens: bool, cas: bool
) -> None:
    settings = config(listen, tls=tls, tokens=tokens, cas=cas)
    if tls and (tokens or cas):
        require_safe(settings)
        return
    with pytest.raises(ConfigError) as caught:
        require_safe(settings)
    named = set(re.findall(r"(?:tls|access)\.\w+", str(caught.value)))
    assert named == ({"tls.cert_file", "tls.key_file"} if not tls else set()) | (
        {"access.tokens_file", "tls.client_ca_file"} if not (tokens or cas) else set()
    )
    assert "--insecure" in str(caught.value)
    assert listen in str(caught.value)


@pytest.mark.parametrize(("tls", "tokens", "cas"), WAYS)
def test_on_loopback_and_where_it_is_told_to_it_starts_with_anything(tls: bool, tokens: bool, cas: bool) -> None:
    for listen in LOOPBACK:
        require_safe(config(listen, tls=tls, tokens=tokens, cas=cas))
    for listen in BEYOND:
        require_safe(config(listen, tls=tls, tokens=tokens, cas=cas, insecure=True))
