"""What a server shows and wants to see in TLS, as handshakes of Python's own `ssl` meet it."""

import asyncio
import base64
import contextlib
import datetime
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from certificates import EXPIRED, NOT_YET_VALID, Authority, Issued
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from structlog.testing import capture_logs

from kedge_server.config import ConfigError, TlsSection
from kedge_server.security import tls
from kedge_server.security.tls import ServerCertificates

DAY = datetime.timedelta(days=1)


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def served(ca: Authority) -> Issued:
    """The files that the server has."""
    return ca.issue("served")


def section(files: Issued, **other: Any) -> TlsSection:
    return TlsSection(cert_file=files.cert_file, key_file=files.key_file, **other)


class Peer:
    """A port with these certificates, and a client that looks at it."""

    def __init__(self, certificates: ServerCertificates) -> None:
        self._server = grpc.server(ThreadPoolExecutor(1))
        self.port = self._server.add_secure_port("127.0.0.1:0", certificates.credentials())
        self._server.start()

    def close(self) -> None:
        self._server.stop(0).wait()

    def shown(self, authority: Authority, *, client: Issued | None = None) -> str:
        """The certificate that it shows to a client which it lets in, PEM."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(authority.ca_file)
        context.set_alpn_protocols(["h2"])
        if client is not None:
            context.load_cert_chain(client.cert_file, client.key_file)
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            assert secure.recv(9), "it hung up"  # SETTINGS: the server has judged the client's certificate
            return ssl.DER_cert_to_PEM_cert(secure.getpeercert(binary_form=True))

    def lets_in(self, authority: Authority, client: Issued | None) -> bool:
        try:
            self.shown(authority, client=client)
        except (AssertionError, OSError):
            return False
        return True


@contextlib.contextmanager
def port_of(certificates: ServerCertificates) -> Iterator[Peer]:
    peer = Peer(certificates)
    yield peer
    peer.close()


def pem(key: Any, **options: Any) -> bytes:
    encryption = options.get("encryption", serialization.NoEncryption())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def encrypted_key() -> bytes:
    return pem(ec.generate_private_key(ec.SECP256R1()), encryption=serialization.BestAvailableEncryption(b"word"))


BAD_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no certificate": ("cert_file", lambda path: path.unlink(), "No such file"),
    "no key": ("key_file", lambda path: path.unlink(), "No such file"),
    "a folder": ("cert_file", lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    "not PEM": ("cert_file", lambda path: path.write_bytes(b"\x30\x82\x01\x00"), "no certificates in PEM"),
    "half a certificate": (
        "cert_file",
        lambda path: path.write_bytes(path.read_bytes()[:300]),
        "no certificates in PEM",
    ),
    "an empty certificate": ("cert_file", lambda path: path.write_bytes(b""), "no certificates in PEM"),
    "a key that is none": ("key_file", lambda path: path.write_text("key"), "no private key in PEM"),
    "half a key": ("key_file", lambda path: path.write_bytes(path.read_bytes()[:100]), "no private key in PEM"),
    "an encrypted key": ("key_file", lambda path: path.write_bytes(encrypted_key()), "encrypted"),
    "another one's key": (
        "key_file",
        lambda path: path.write_bytes(pem(ec.generate_private_key(ec.SECP256R1()))),
        "one pair",
    ),
    "Ed25519": ("key_file", lambda path: path.write_bytes(pem(ed25519.Ed25519PrivateKey.generate())), "P-256"),
    "P-521": ("key_file", lambda path: path.write_bytes(pem(ec.generate_private_key(ec.SECP521R1()))), "P-256"),
    "a weak key": ("key_file", lambda path: path.write_bytes(pem(rsa.generate_private_key(65537, 1024))), "2048"),
    "no CA": ("client_ca_file", lambda path: path.unlink(), "No such file"),
    "an empty bundle": ("client_ca_file", lambda path: path.write_bytes(b""), "no certificates in PEM"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_cannot_be_used_are_refused_at_the_start_by_key_and_path(
    case: str, ca: Authority, served: Issued
) -> None:
    key, spoil, text = BAD_FILES[case]
    settings = section(served, client_ca_file=ca.ca_file)
    path = getattr(settings, key)
    secret = served.key.decode().splitlines()[1]
    spoil(path)
    with pytest.raises(ConfigError) as caught:
        ServerCertificates(settings)
    message = str(caught.value)
    assert message.startswith(f"tls.{key} = {str(path)!r}: ")
    assert text in message
    assert secret[:16] not in message


@pytest.mark.parametrize(("days", "text"), [(EXPIRED, "expired at 20"), (NOT_YET_VALID, "not valid before 20")])
def test_certificate_that_is_not_valid_now_is_refused_at_the_start(
    ca: Authority, days: tuple[float, float], text: str
) -> None:
    files = ca.issue("server", days=days)
    with pytest.raises(ConfigError) as caught:
        ServerCertificates(section(files))
    assert str(caught.value).startswith("tls.cert_file = ")
    assert text in str(caught.value)


def test_client_cas_that_have_all_expired_are_refused_and_one_of_several_is_not(
    ca: Authority, served: Issued, tmp_path: Path
) -> None:
    expired = ca.issue("old", days=EXPIRED)
    with pytest.raises(ConfigError, match=r"tls\.client_ca_file = .*expired"):
        ServerCertificates(section(served, client_ca_file=expired.cert_file))
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(expired.cert + ca.ca)
    ServerCertificates(section(served, client_ca_file=bundle))


@pytest.mark.parametrize(
    "make_key",
    [
        lambda: rsa.generate_private_key(65537, 2048),
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP384R1()),
    ],
)
def test_kinds_of_keys_that_are_taken_do_make_handshakes(ca: Authority, make_key: Callable[[], Any]) -> None:
    files = ca.issue("server", key=make_key())
    with port_of(ServerCertificates(section(files))) as port:
        assert port.shown(ca) == files.cert.decode()


def test_files_that_are_replaced_one_after_the_other_hold_once_they_are_a_pair(ca: Authority, served: Issued) -> None:
    certificates = ServerCertificates(section(served))
    first, second = served.cert, ca.issue("second")
    with port_of(certificates) as port, capture_logs() as log:
        assert port.shown(ca) == first.decode()
        served.cert_file.write_bytes(second.cert)
        for _ in range(3):
            certificates.look()
        assert port.shown(ca) == first.decode()
        assert [line["log_level"] for line in log] == ["error"]
        assert "one pair" in log[0]["cause"]
        served.key_file.write_bytes(second.key)
        certificates.look()
        assert port.shown(ca) == second.cert.decode()
    assert second.key.decode().splitlines()[1] not in str(log)


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:200])])
def test_what_held_before_holds_on_while_files_cannot_be_used(
    ca: Authority, served: Issued, spoil: Callable[[Path], object]
) -> None:
    settings = section(served, client_ca_file=ca.folder / "clients.pem")
    settings.client_ca_file.write_bytes(ca.ca)
    certificates = ServerCertificates(settings)
    first, client = served.cert, ca.issue("client")
    with port_of(certificates) as port, capture_logs() as log:
        for path in (settings.cert_file, settings.key_file, settings.client_ca_file):
            was = path.read_bytes()
            spoil(path)
            certificates.look()
            assert port.shown(ca, client=client) == first.decode()
            path.write_bytes(was)
            certificates.look()
    assert len(log) == 3


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_damaged_in_a_file_does_no_harm(ca: Authority, served: Issued, seed: int) -> None:
    settings = section(served, client_ca_file=ca.ca_file)
    path = (settings.cert_file, settings.key_file, settings.client_ca_file)[seed]
    certificates, whole, choice = ServerCertificates(settings), path.read_bytes(), random.Random(seed)
    begin, *lines, end = whole.decode().splitlines()
    der = base64.b64decode("".join(lines))
    for _ in range(1000):
        damaged = bytearray(der)
        for _ in range(choice.choice([1, 1, 3])):
            damaged[choice.randrange(len(der))] = choice.choice([0, 1, 127, 128, 255, choice.randrange(256)])
        path.write_text("\n".join([begin, base64.encodebytes(damaged).decode().strip(), end]))
        certificates.look()
    path.write_bytes(whole)
    certificates.look()
    with port_of(certificates) as port:
        assert port.lets_in(ca, ca.issue("client"))


def test_expired_certificate_does_not_take_the_place_of_one_that_holds(ca: Authority, served: Issued) -> None:
    certificates = ServerCertificates(section(served))
    first = served.cert
    served.replace(ca.issue("old", days=EXPIRED))
    with port_of(certificates) as port:
        certificates.look()
        assert port.shown(ca) == first.decode()


def test_certificate_that_comes_too_early_is_taken_up_when_its_time_comes(ca: Authority, served: Issued) -> None:
    now = datetime.datetime.now(datetime.UTC)
    certificates = ServerCertificates(section(served), clock=lambda: now)
    early = ca.issue("early", days=(1, 30))
    first = served.cert
    served.replace(early)
    with port_of(certificates) as port:
        certificates.look()
        assert port.shown(ca) == first.decode()
        now += 2 * DAY
        certificates.look()
        with pytest.raises(ssl.SSLCertVerificationError, match="not yet valid"):  # by this client's clock
            port.shown(ca)


def test_client_cas_come_and_go_with_their_file(ca: Authority, served: Issued, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(ca.ca)
    certificates = ServerCertificates(section(served, client_ca_file=bundle))
    mine, theirs = ca.issue("mine"), other.issue("theirs")
    with port_of(certificates) as port:
        for content, lets_in in [(ca.ca, (1, 0)), (ca.ca + other.ca, (1, 1)), (other.ca, (0, 1))]:
            bundle.write_bytes(content)
            certificates.look()
            assert (port.lets_in(ca, mine), port.lets_in(ca, theirs), port.lets_in(ca, None)) == (*lets_in, 0)


def test_withdrawn_client_ca_is_out_although_the_pair_is_broken(ca: Authority, served: Issued, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(ca.ca + other.ca)
    certificates = ServerCertificates(section(served, client_ca_file=bundle))
    mine, theirs = ca.issue("mine"), other.issue("theirs")
    with port_of(certificates) as port:
        served.key_file.unlink()
        bundle.write_bytes(ca.ca)
        certificates.look()
        assert port.lets_in(ca, mine)
        assert not port.lets_in(ca, theirs)


@pytest.mark.parametrize("event", ["a CA ends", "the file changes", "nothing"])
def test_sessions_can_be_resumed_until_what_they_were_made_with_changes(
    ca: Authority, served: Issued, tmp_path: Path, event: str
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    bundle, client = tmp_path / "bundle.pem", ca.issue("client")
    bundle.write_bytes(ca.ca)
    certificates = ServerCertificates(section(served, client_ca_file=bundle), clock=lambda: now)
    context = ssl.create_default_context(cafile=ca.ca_file)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # there the session is known with the handshake
    context.load_cert_chain(client.cert_file, client.key_file)
    context.set_alpn_protocols(["h2"])

    def session(port: int, resumed: ssl.SSLSession | None = None) -> tuple[ssl.SSLSession | None, bool | None]:
        plain = socket.create_connection(("127.0.0.1", port), timeout=10)
        with context.wrap_socket(plain, server_hostname="localhost", session=resumed) as secure:
            return secure.session, secure.session_reused

    with port_of(certificates) as port:
        first, _ = session(port.port)
        assert session(port.port, first)[1]
        if event == "a CA ends":
            now += 40 * DAY
        elif event == "the file changes":
            bundle.write_bytes(ca.ca + ca.ca)
        certificates.look()
        assert session(port.port, first)[1] == (event == "nothing")


def test_that_a_certificate_ends_is_said_once_before_and_once_after(ca: Authority) -> None:
    now = datetime.datetime.now(datetime.UTC)
    with capture_logs() as log:
        certificates = ServerCertificates(section(ca.issue("server", days=(-1, 10))), clock=lambda: now)
        counts = []
        for days in (0, 2, 4, 4.5, 9, 11, 12):
            now = datetime.datetime.now(datetime.UTC) + days * DAY
            certificates.look()
            counts.append(sum(line["log_level"] == "warning" for line in log))
    assert counts == [0, 0, 1, 1, 1, 2, 2]


async def test_watch_takes_up_what_has_settled(ca: Authority, served: Issued, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(tls, "SETTLE_SECONDS", 0.01)
    certificates = ServerCertificates(section(served))
    watching = asyncio.create_task(certificates.watch())
    second = ca.issue("second")
    with port_of(certificates) as port:
        served.replace(second)
        async with asyncio.timeout(30):
            while await asyncio.to_thread(port.shown, ca) != second.cert.decode():
                await asyncio.sleep(0.01)
    watching.cancel()


async def test_what_is_being_written_is_not_looked_at(
    ca: Authority, served: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates, second, waits = ServerCertificates(section(served)), ca.issue("second"), []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if waits == [tls.POLL_SECONDS]:
            served.cert_file.write_bytes(second.cert)
        if waits == [tls.POLL_SECONDS, tls.SETTLE_SECONDS]:
            served.key_file.write_bytes(second.key)
        if waits.count(tls.POLL_SECONDS) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(tls, "asyncio", SimpleNamespace(sleep=sleep))
    with port_of(certificates) as port, capture_logs() as log:
        with pytest.raises(asyncio.CancelledError):
            await certificates.watch()
        assert await asyncio.to_thread(port.shown, ca) == second.cert.decode()
    assert [line["log_level"] for line in log] == ["info"]


def test_every_handshake_is_whole_while_files_change(ca: Authority, served: Issued) -> None:
    certificates = ServerCertificates(section(served))
    others = [ca.issue(f"other{index}") for index in range(4)]
    known = {served.cert.decode(), *(other.cert.decode() for other in others)}
    has_ended = threading.Event()

    def keep_changing() -> None:
        while not has_ended.is_set():
            for other in others:
                served.replace(other)
                certificates.look()

    with port_of(certificates) as port, ThreadPoolExecutor(1) as pool:
        changing = pool.submit(keep_changing)
        shown = {port.shown(ca) for _ in range(60)}
        has_ended.set()
        changing.result()
    assert shown <= known
    assert len(shown) > 1
