"""Who is known, and as of when: a file of tokens on the disk, and what is said of it."""

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog
from tokens_file import TokensFile

from kedge_server.security import access
from kedge_server.security.access import Access, Credentials, parse_uri
from kedge_server.security.roles import EVERYBODY, Caller, Role

WORKER = Caller("a", Role.WORKER, ("*",))


@pytest.fixture
def file(tmp_path: Path) -> TokensFile:
    return TokensFile(tmp_path / "tokens")


@pytest.fixture
def said() -> Iterator[list[dict[str, str]]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


def of(token: str) -> Credentials:
    return Credentials(hashlib.sha256(token.encode()).digest())


def certified(*uris: str, token: str | None = None) -> Credentials:
    return Credentials(None if token is None else of(token).token_sha256, uris)


def test_who_asks_nobody_knows_everybody() -> None:
    known = Access()
    assert not known.asks
    assert known.caller(Credentials()) == EVERYBODY


def test_who_asks_knows_whose_tokens_stand_in_the_file(file: TokensFile) -> None:
    token = file.add("a", "worker")
    file.write()
    known = Access(file.path)
    assert known.asks
    assert known.caller(of(token)) == WORKER
    assert known.caller(of(f"{token} ")) is None
    assert known.caller(Credentials()) is None
    assert known.caller(certified("kedge://a/admin")) is None  # nobody has verified any certificate


@pytest.mark.parametrize(("minutes", "who"), [(1, "a"), (-1, None)])
def test_certificate_that_has_expired_is_nobodys(file: TokensFile, minutes: int, who: str | None) -> None:
    token = file.add("b", "worker")
    file.write()
    ends_at = datetime.now(UTC) + timedelta(minutes=minutes)
    known = Access(file.path, takes_certificates=True)
    identified = certified("kedge://a/worker", token=token)._replace(certificate_ends_at=ends_at)
    assert getattr(known.caller(identified), "identity", None) == who
    with_token = certified(token=token)._replace(certificate_ends_at=ends_at)
    assert (known.caller(with_token) is None) == (who is None)


def test_file_without_a_token_lets_nobody_in(file: TokensFile) -> None:
    assert Access(file.path).asks
    assert Access(file.path).caller(of("")) is None


def test_file_that_is_not_there_or_is_none_is_no_start(file: TokensFile) -> None:
    with pytest.raises(OSError, match="missing"):
        Access(file.path.with_name("missing"))
    file.write_text("geheim\n")
    with pytest.raises(ValueError, match=r"^line 1: [^g]*$"):
        Access(file.path)


# Certificates


@pytest.mark.parametrize(
    ("uri", "caller"),
    [
        ("kedge://a/worker", WORKER),
        ("kedge://a/admin/digits,exp-*", Caller("a", Role.ADMIN, ("digits", "exp-*"))),
        ("kedge://a/reader/*", Caller("a", Role.READER)),
        ("kedge://a", None),
        ("kedge://a/", None),
        ("kedge:///worker", None),
        ("kedge://a/worker/", None),
        ("kedge://a/worker/digits/more", None),
        ("kedge://a/boss", None),
        ("kedge://a/Worker", None),
        ("kedge://a b/worker", None),
        ("kedge://a/worker/exp-%2A", None),
        ("kedge://a/worker?role=admin", None),
        ("kedge://u@a/worker", None),
        ("kedge://\ufffd/worker", None),
    ],
)
def test_certificate_says_who_its_holder_is(uri: str, caller: Caller | None) -> None:
    assert parse_uri(uri) == caller
    known = Access(takes_certificates=True)
    assert known.asks
    assert known.caller(certified(uri)) == caller
    assert known.caller(certified("https://example.org", uri)) == caller


def test_certificate_goes_before_a_token_even_if_it_says_nothing_that_is_understood(file: TokensFile) -> None:
    token = file.add("a", "worker")
    file.write()
    known = Access(file.path, takes_certificates=True)
    assert known.caller(certified("kedge://b/reader", token=token)) == Caller("b", Role.READER)
    assert known.caller(certified("kedge://b/boss", token=token)) is None
    assert known.caller(certified("https://example.org", token=token)) == WORKER
    assert known.caller(certified("https://example.org")) is None


def test_certificate_of_two_identities_is_nobodys(file: TokensFile) -> None:
    known = Access(takes_certificates=True)
    assert known.caller(certified("kedge://b/reader", "kedge://a/admin")) is None
    assert known.caller(certified("kedge://b/reader", "kedge://b/reader")) is None


# Reading again


def test_change_of_the_file_holds_and_is_told_of(file: TokensFile) -> None:
    old, gone = file.add("a", "worker"), file.add("b", "admin")
    file.write()
    known = Access(file.path)
    changes: list[None] = []
    known.on_change(lambda: changes.append(None))
    known.look()
    assert not changes
    new = file.add("a", "worker")
    file.remove(gone)
    file.write()
    known.look()
    assert [known.caller(of(token)) for token in (old, new, gone)] == [WORKER, WORKER, None]
    file.add("a", "reader", "digits", token=new)
    file.write()
    known.look()
    assert known.caller(of(new)) == Caller("a", Role.READER, ("digits",))
    assert len(changes) == 2


def test_change_of_same_length_and_time_is_seen(file: TokensFile, tmp_path: Path) -> None:
    old = file.add("a", "worker")
    file.write()
    known, before = Access(file.path), file.path.stat()
    file.remove(old)
    new = file.add("a", "worker")
    text = f"a:worker:{hashlib.sha256(new.encode()).hexdigest()}\n"
    file.path.write_text(text)
    os.utime(file.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.path.stat()
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (before.st_mtime_ns, before.st_size, before.st_ino)
    known.look()
    assert [known.caller(of(token)) for token in (old, new)] == [None, WORKER]


def make_it_bad(file: TokensFile) -> None:
    file.write_text(f"a:worker:{hashlib.sha256(b'other').hexdigest()}\ngeheim\n")


def make_it_binary(file: TokensFile) -> None:
    file.path.write_bytes(b"\n\xff\xfe\x00geheim")


def make_it_vanish(file: TokensFile) -> None:
    file.path.unlink()


def make_it_a_folder(file: TokensFile) -> None:
    file.path.unlink()
    file.path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (make_it_bad, "line 2: "),
        (make_it_binary, "line 2: "),
        (make_it_vanish, "No such file"),
        (make_it_a_folder, "directory"),
    ],
)
def test_file_that_cannot_be_read_changes_nothing_which_is_said_once(
    file: TokensFile, said: list[dict[str, str]], spoil: Callable[[TokensFile], None], cause: str
) -> None:
    token = file.add("a", "worker")
    file.write()
    known = Access(file.path)
    changes: list[None] = []
    known.on_change(lambda: changes.append(None))
    spoil(file)
    for _ in range(3):
        known.look()
    assert known.caller(of(token)) == WORKER
    assert not changes
    (line,) = said
    assert line["log_level"] == "error"
    assert cause in line["cause"]
    assert line["file"] == str(file.path)
    assert "geheim" not in repr(said)


def test_file_that_comes_back_is_read_and_one_that_is_bad_in_another_way_is_said_again(
    file: TokensFile, said: list[dict[str, str]]
) -> None:
    token = file.add("a", "worker")
    file.write()
    known = Access(file.path)
    for text in ("bad\n", "\nbad\n"):
        file.write_text(text)
        known.look()
    file.write()
    known.look()
    assert known.caller(of(token)) == WORKER
    assert [line["log_level"] for line in said] == ["error", "error", "info"]


async def test_file_in_the_middle_of_being_written_ends_no_token(
    file: TokensFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another one each time that it is looked at, until it is whole."""
    token = file.add("a", "worker")
    file.write()
    known, changes = Access(file.path), []
    known.on_change(lambda: changes.append(None))
    other = hashlib.sha256(b"other").hexdigest()
    states = [(access.POLL_SECONDS, ""), (access.SETTLE_SECONDS, f"b:worker:{other}\n")]
    states += [(access.POLL_SECONDS, f"b:admin:{other}\n"), (access.SETTLE_SECONDS, file.path.read_text())]
    states += [(access.POLL_SECONDS, file.path.read_text())]
    remaining = iter(states)

    async def sleep(seconds: float) -> None:
        expected_seconds, text = next(remaining, (None, ""))
        if expected_seconds is None:
            raise asyncio.CancelledError
        assert seconds == expected_seconds
        file.path.write_text(text)

    monkeypatch.setattr(access.asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await known.watch()
    assert known.caller(of(token)) == WORKER
    assert not changes


async def test_watch_takes_a_change_up_within_the_two_seconds_that_are_promised(file: TokensFile) -> None:
    token = file.add("a", "worker")
    file.write()
    known, changed = Access(file.path), asyncio.Event()
    known.on_change(changed.set)
    watching = asyncio.create_task(known.watch())
    file.remove(token)
    file.write()
    await asyncio.wait_for(changed.wait(), 30)
    watching.cancel()
    assert known.caller(of(token)) is None
    assert access.POLL_SECONDS + access.SETTLE_SECONDS < 2
