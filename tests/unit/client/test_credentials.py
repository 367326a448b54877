"""Files of credentials: what is refused, and what becomes of a change."""

import logging

import pytest
from certificates import Authority
from cryptography.hazmat.primitives import serialization
from faulty_transport import Time

from kedge.config import resolve_credentials
from kedge.transport.credentials import LOOK_SECONDS, Credentials


@pytest.fixture
def ca(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def time():
    return Time()


def credentials(time=None, **given):
    sources = resolve_credentials(**given)
    return Credentials(sources) if time is None else Credentials(sources, clock=time)


def looks(held, time):
    """What is said when it is looked at often enough for a change that is over."""
    answers = []
    for _ in range(3):
        time.now += LOOK_SECONDS
        answers.append(held.have_changed())
    assert answers.count(True) <= 1
    return any(answers)


def test_none_are_none(time):
    held = credentials(time)
    assert held.metadata is None
    assert not held.is_secure
    assert not looks(held, time)


def test_a_token_goes_along(tmp_path):
    (tmp_path / "token").write_text(" kedge_abc\n")
    assert credentials(token_file=tmp_path / "token").metadata == (("authorization", "Bearer kedge_abc"),)
    assert credentials(token="kedge_abc").metadata == (("authorization", "Bearer kedge_abc"),)
    assert "kedge_abc" not in repr(credentials(token="kedge_abc"))


def test_another_token_is_taken_up(tmp_path, time):
    path = tmp_path / "token"
    path.write_text("one")
    held = credentials(time, token_file=path)
    path.write_text("other")
    assert not held.have_changed(), "it is not looked at all the time"
    assert looks(held, time)
    assert held.metadata == (("authorization", "Bearer other"),)
    path.write_text("third")
    assert held.have_changed(at_once=True)
    assert held.metadata == (("authorization", "Bearer third"),)
    path.write_text("third")
    assert not looks(held, time), "it holds the same"


@pytest.mark.parametrize("content", ["", "two words", "\xff", None])
def test_what_cannot_be_used_changes_nothing_and_is_said_once(tmp_path, time, caplog, content):
    path = tmp_path / "token"
    path.write_text("one")
    held = credentials(time, token_file=path)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with caplog.at_level(logging.WARNING, logger="kedge"):
        assert not looks(held, time)
        assert not looks(held, time)
    assert held.metadata == (("authorization", "Bearer one"),)
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert "two words" not in record.getMessage()
    path.write_text("two")
    assert looks(held, time)


def test_a_pair_of_which_one_half_is_written_is_waited_for(ca, time, caplog):
    own, fresh = ca.issue("own"), ca.issue("fresh")
    held = credentials(time, ca_file=ca.ca_file, cert_file=own.cert_file, key_file=own.key_file)
    own.key_file.write_bytes(fresh.key)
    time.now += LOOK_SECONDS
    assert not held.have_changed()
    own.cert_file.write_bytes(fresh.cert)
    assert looks(held, time)
    assert caplog.records == []


@pytest.mark.parametrize("name", ["token_file", "ca_file", "cert_file", "key_file"])
def test_a_file_that_is_not_there(ca, tmp_path, name):
    own = ca.issue("own")
    given = {"ca_file": ca.ca_file, "cert_file": own.cert_file, "key_file": own.key_file}
    with pytest.raises(ValueError, match=f"{name} .*nowhere cannot be read: No such file"):
        credentials(**given | {name: tmp_path / "nowhere"})


@pytest.mark.parametrize("name", ["ca_file", "cert_file", "key_file"])
@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE-----\nx", b"\x00\xff"])
def test_a_file_of_something_else(ca, tmp_path, name, content):
    own = ca.issue("own")
    given = {"ca_file": ca.ca_file, "cert_file": own.cert_file, "key_file": own.key_file}
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match=r"holds no (certificate|private key)"):
        credentials(**given | {name: tmp_path / "other"})


def test_halves_of_two_pairs(ca):
    one, two = ca.issue("one"), ca.issue("two")
    with pytest.raises(ValueError, match="are not of one pair"):
        credentials(ca_file=ca.ca_file, cert_file=one.cert_file, key_file=two.key_file)


def test_an_encrypted_key(ca, tmp_path):
    own, locked = ca.issue("own"), tmp_path / "locked.pem"
    key = serialization.load_pem_private_key(own.key, None)
    in_pem, in_pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked.write_bytes(key.private_bytes(in_pem, in_pkcs8, serialization.BestAvailableEncryption(b"secret")))
    with pytest.raises(ValueError, match=r"locked\.pem is encrypted: give one without a password"):
        credentials(ca_file=ca.ca_file, cert_file=own.cert_file, key_file=locked)
