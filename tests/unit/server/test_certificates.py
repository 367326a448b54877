"""`kedge-server certs dev`: OpenSSL and Python's `ssl` judge what is made, and not the library that made it."""

import datetime
import shutil
import socket
import ssl
import stat
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from certificates import EXPIRED, Authority
from cryptography import x509
from typer.testing import CliRunner

from kedge_server import cli
from kedge_server.config import TlsSection
from kedge_server.security import certificates
from kedge_server.security.access import parse_uri
from kedge_server.security.roles import ALL_RUNS, Role
from kedge_server.security.tls import ServerCertificates

LEAVES = ("server", "admin", "worker", "reader")
FILES = {f"{name}{end}" for name in ("ca", *LEAVES) for end in (".pem", "-key.pem")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def openssl(*arguments: object) -> str:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command")
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def test_it_makes_a_ca_and_a_pair_for_the_server_and_each_role(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    made = certificates.make(folder)
    assert set(contents(folder)) == FILES
    assert made.is_ca_new
    for name in LEAVES:
        found = certificate(folder / f"{name}.pem")
        assert made.ends_at == found.not_valid_after_utc
        life = found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        assert datetime.timedelta(days=89, hours=23) < life <= datetime.timedelta(days=90)


def test_keys_are_their_owners_alone(tmp_path: Path) -> None:
    certificates.make(tmp_path)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == {name for name in FILES if "-key" in name}
    assert {mode for name, mode in modes.items() if "-key" not in name} == {0o644}


def test_openssl_accepts_them_by_its_strict_rules(tmp_path: Path) -> None:
    certificates.make(tmp_path, ["kedge.example.org"])
    ca = tmp_path / "ca.pem"
    strictly = ("verify", "-x509_strict", "-CAfile", ca)
    for name in ("localhost", "kedge.example.org"):
        said = openssl(*strictly, "-purpose", "sslserver", "-verify_hostname", name, tmp_path / "server.pem")
        assert said.endswith("OK\n")
    for address in ("127.0.0.1", "::1"):
        assert openssl(*strictly, "-verify_ip", address, tmp_path / "server.pem").endswith("OK\n")
    assert "mismatch" in openssl(*strictly, "-verify_hostname", "example.org", tmp_path / "server.pem")
    for name in LEAVES:
        assert openssl(*strictly, "-purpose", "sslclient", tmp_path / f"{name}.pem").endswith("OK\n")
    assert "unsuitable" in openssl(*strictly, "-purpose", "sslserver", tmp_path / "worker.pem")


@pytest.mark.parametrize("role", Role)
def test_clients_are_who_their_uri_says(tmp_path: Path, role: Role) -> None:
    certificates.make(tmp_path)
    names = certificate(tmp_path / f"{role.text}.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName)
    [uri] = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    assert parse_uri(uri) == (role.text, role, ALL_RUNS)


def test_the_server_is_nobody_and_has_this_hosts_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "host-a")
    certificates.make(tmp_path, ["10.0.0.5", "*.example.org"])
    names = certificate(tmp_path / "server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == []
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "host-a", "*.example.org"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["127.0.0.1", "::1", "10.0.0.5"]


def test_second_call_renews_what_the_ca_signed_and_keeps_the_hosts(tmp_path: Path) -> None:
    certificates.make(tmp_path, ["kedge.example.org"])
    before = contents(tmp_path)
    made = certificates.make(tmp_path)
    after = contents(tmp_path)
    assert not made.is_ca_new
    assert "kedge.example.org" in made.hosts
    assert {name for name in FILES if after[name] == before[name]} == {"ca.pem", "ca-key.pem"}
    assert set(after) == FILES
    ServerCertificates(TlsSection(cert_file=made.server.cert_file, key_file=made.server.key_file))
    assert "kedge.example.org" not in certificates.make(tmp_path, ["other.example.org"]).hosts


def test_renewed_key_keeps_the_mode_that_somebody_gave_it(tmp_path: Path) -> None:
    certificates.make(tmp_path)
    key = tmp_path / "server-key.pem"
    key.chmod(0o640)
    certificates.make(tmp_path)
    assert stat.S_IMODE(key.stat().st_mode) == 0o640


def test_several_that_make_at_once_leave_what_belongs_together(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(certificates.make, [tmp_path] * 4))
    assert [each.is_ca_new for each in made].count(True) == 1
    ca = certificate(tmp_path / "ca.pem")
    for name in LEAVES:
        certificate(tmp_path / f"{name}.pem").verify_directly_issued_by(ca)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}-key.pem")
    assert set(contents(tmp_path)) == FILES


def test_certificate_without_its_key_is_made_anew(tmp_path: Path) -> None:
    """What is left behind where it was killed between the two."""
    certificates.make(tmp_path)
    (tmp_path / "worker-key.pem").unlink()
    made = certificates.make(tmp_path)
    pair = made.clients[Role.WORKER]
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(pair.cert_file, pair.key_file)


def test_leaves_do_not_outlive_their_ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "CA_LIFE", datetime.timedelta(days=30))
    made = certificates.make(tmp_path)
    assert made.ends_at == certificate(tmp_path / "ca.pem").not_valid_after_utc


def foreign_leaf(folder: Path) -> str:
    (folder / "elsewhere").mkdir()
    issued = Authority(folder / "elsewhere").issue("worker")
    shutil.copy(issued.cert_file, folder / "worker.pem")
    return "worker.pem"


def foreign_key(folder: Path) -> str:
    (folder / "admin-key.pem").write_text("mine")
    return "admin-key.pem"


def no_certificate(folder: Path) -> str:
    (folder / "server.pem").write_text("mine")
    return "server.pem"


def half_a_ca(folder: Path) -> str:
    (folder / "ca.pem").write_text("mine")
    return "ca-key.pem"


def no_ca(folder: Path) -> str:
    issued = Authority(folder).issue("leaf")
    shutil.copy(issued.cert_file, folder / "ca.pem")
    shutil.copy(issued.key_file, folder / "ca-key.pem")
    return "ca.pem"


def expired_ca(folder: Path) -> str:
    issued = Authority(folder).issue("leaf", days=EXPIRED, is_ca=True)
    shutil.copy(issued.cert_file, folder / "ca.pem")
    shutil.copy(issued.key_file, folder / "ca-key.pem")
    return "ca.pem"


def mismatched_ca(folder: Path) -> str:
    certificates.make(folder)
    shutil.copy(folder / "admin-key.pem", folder / "ca-key.pem")
    return "ca-key.pem"


@pytest.mark.parametrize(
    "lay", [foreign_leaf, foreign_key, no_certificate, half_a_ca, no_ca, expired_ca, mismatched_ca]
)
def test_what_is_not_its_own_is_not_overwritten_and_nothing_else_is_touched(tmp_path: Path, lay) -> None:
    named = lay(tmp_path)
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=named) as caught:
        certificates.make(tmp_path)
    assert "another folder" in str(caught.value) or "move it" in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("host", ["", "a b", "kedge:50051", "bücher.example", "a..b", "-a", "https://a", "*"])
def test_what_is_no_host_is_refused_before_anything_is_made(tmp_path: Path, host: str) -> None:
    with pytest.raises(ValueError, match="is no host"):
        certificates.make(tmp_path, [host])
    assert contents(tmp_path) == {}


def test_the_command_says_what_to_set_on_both_sides(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    said = CliRunner().invoke(cli.app, ["certs", "dev", str(folder), "--host", "kedge.example.org"])
    assert said.exit_code == 0
    assert "kedge.example.org" in said.output
    toml = said.output[said.output.index("[tls]") : said.output.index("Its clients")]
    settings = TlsSection(**tomllib.loads(toml)["tls"])
    ServerCertificates(settings)
    assert settings.client_ca_file == folder / "ca.pem"
    variables = dict(
        line.removeprefix("export ").split("  #")[0].split("=")
        for line in said.output.splitlines()
        if line.startswith("export ")
    )
    assert variables == {
        "KEDGE_CA_FILE": str(folder / "ca.pem"),
        "KEDGE_CERT_FILE": str(folder / "worker.pem"),
        "KEDGE_KEY_FILE": str(folder / "worker-key.pem"),
    }
    refused = CliRunner().invoke(cli.app, ["certs", "dev", str(folder), "--host", "a b"])
    assert (refused.exit_code, "is no host" in refused.output) == (2, True)
