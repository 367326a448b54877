"""Tokens, and `kedge-server token new`. Digests are hashlib's, by this module's own hand."""

import hashlib
import os
import re
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from durable_server import kedge_server

from kedge_server.security import token_file
from kedge_server.security.roles import Caller, Role
from kedge_server.security.tokens import Token, digest, find, new_token, parse_tokens

DIGESTS = [hashlib.sha256(token.encode()).hexdigest() for token in ("one", "two", "three")]


def caller_of(text: str, token: str) -> Caller | None:
    return find(parse_tokens(text), hashlib.sha256(token.encode()).digest())


def test_file_with_comments_and_empty_lines_is_read() -> None:
    text = f"# ours\n\n  a:admin:{DIGESTS[0]}  \r\n#b:admin:{DIGESTS[1]}\n\t\nb:worker:digits,exp-*:{DIGESTS[2]}"
    assert caller_of(text, "one") == Caller("a", Role.ADMIN, ("*",))
    assert caller_of(text, "two") is None
    assert caller_of(text, "three") == Caller("b", Role.WORKER, ("digits", "exp-*"))


def test_id_may_have_several_tokens() -> None:
    text = f"a:worker:{DIGESTS[0]}\na:worker:{DIGESTS[1]}\n"
    assert caller_of(text, "one") == caller_of(text, "two") == Caller("a", Role.WORKER, ("*",))


@pytest.mark.parametrize(
    "line",
    [
        "geheim",
        "geheim:admin",
        f"a:geheim:{DIGESTS[1]}",
        f"a:admin:*:geheim:{DIGESTS[1]}",
        f"a:worker:geheim geheim:{DIGESTS[1]}",
        f"a:worker::{DIGESTS[1]}",
        f"geheim geheim:worker:{DIGESTS[1]}",
        f":worker:{DIGESTS[1]}",
        "a:worker:geheim",
        f"a:worker:{DIGESTS[1].upper()}",
        f"a:worker:{DIGESTS[1][:-1]}",
        f"a:worker:{DIGESTS[1]}0",
        f"a:worker:{DIGESTS[1]} # geheim",
        f"a:Worker:{DIGESTS[1]}",
    ],
)
def test_bad_line_is_named_by_its_number_and_never_repeated(line: str) -> None:
    with pytest.raises(ValueError, match=r"^line 3: ") as refused:
        parse_tokens(f"# two lines before it\na:worker:{DIGESTS[0]}\n{line}\n")
    assert "geheim" not in str(refused.value)
    assert not re.search("[0-9a-fA-F]{16}", str(refused.value))


@pytest.mark.parametrize("break_", ["\v", "\f", "\x1c", "\x85", "\u2028"])
def test_only_a_newline_ends_a_line(break_: str) -> None:
    """Else a comment could hide a line that counts."""
    assert caller_of(f"# x{break_}a:admin:{DIGESTS[0]}\n", "one") is None


def test_token_that_stands_twice_is_refused_since_to_take_one_line_out_would_not_end_it() -> None:
    with pytest.raises(ValueError, match="line 2: the token of line 1 again"):
        parse_tokens(f"a:worker:{DIGESTS[0]}\nb:admin:{DIGESTS[0]}\n")


def test_new_tokens_are_unlike_each_other_and_their_lines_hold_no_more_than_digests() -> None:
    made = [new_token("a", Role.WORKER, ("digits", "exp-*")) for _ in range(100)]
    assert len({token for token, _ in made}) == 100
    for token, line in made:
        assert re.fullmatch("kedge_[A-Za-z0-9_-]{43}", token)  # 256 bits in base 64
        assert line.line == f"a:worker:digits,exp-*:{hashlib.sha256(token.encode()).hexdigest()}"
        assert parse_tokens(line.line) == (line,)


def test_line_of_all_runs_names_none() -> None:
    assert Token(Caller("a", Role.ADMIN), bytes.fromhex(DIGESTS[0])).line == f"a:admin:{DIGESTS[0]}"


@pytest.mark.parametrize("token", ["", "ä", "\udcff", "\x00", "x" * 100_000])
def test_anything_has_a_digest(token: str) -> None:
    assert len(digest(token)) == 32


def test_whoever_looks_on_learns_nothing_from_how_many_tokens_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are, wherever the right one stands, and with a comparison that is made for it."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("hmac.compare_digest", compare)
    tokens = parse_tokens("".join(f"a:worker:{digest_}\n" for digest_ in DIGESTS))
    for presented in ("one", "three", "none"):
        compared.clear()
        find(tokens, hashlib.sha256(presented.encode()).digest())
        assert len(compared) == len(DIGESTS)


# token new


def test_command_prints_the_token_alone_and_appends_its_line(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    made = kedge_server("token", "new", "trainer", "--role", "worker", "--runs", "digits,exp-*", "--file", file)
    assert (made.returncode, made.stdout.count("\n")) == (0, 1)
    token = made.stdout.strip()
    assert file.read_text() == f"trainer:worker:digits,exp-*:{hashlib.sha256(token.encode()).hexdigest()}\n"
    assert token not in made.stderr
    assert str(file) in made.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_command_without_a_file_says_the_line_and_what_to_do_with_it() -> None:
    made = kedge_server("token", "new", "boss", "--role", "admin")
    token = made.stdout.strip()
    assert f"boss:admin:{hashlib.sha256(token.encode()).hexdigest()}" in made.stderr.splitlines()
    assert "access.tokens_file" in made.stderr
    assert token not in made.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a b", "--role", "worker"], "an id has"),
        (["a", "--role", "worker", "--runs", "a b"], "joined by commas"),
        (["a", "--role", "boss"], "boss"),
        (["a"], "role"),
    ],
)
def test_command_refuses_what_cannot_stand_in_a_file(tmp_path: Path, arguments: list[str], said: str) -> None:
    file = tmp_path / "tokens"
    refused = kedge_server("token", "new", *arguments, "--file", file)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert said in refused.stderr
    assert not file.exists()


def test_command_leaves_a_file_alone_that_is_none_of_tokens(tmp_path: Path) -> None:
    file = tmp_path / "trainer.token"
    file.write_text("kedge_geheim\n")
    refused = kedge_server("token", "new", "a", "--role", "worker", "--file", file)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "line 1" in refused.stderr
    assert "geheim" not in refused.stderr
    assert file.read_text() == "kedge_geheim\n"


@pytest.mark.parametrize("name", ["missing/tokens", "."])
def test_command_says_when_the_file_cannot_be_written(tmp_path: Path, name: str) -> None:
    refused = kedge_server("token", "new", "a", "--role", "worker", "--file", tmp_path / name)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_line_is_added_to_what_is_there_whatever_its_end_and_its_mode(tmp_path: Path) -> None:
    file, line = tmp_path / "tokens", new_token("b", Role.READER)[1]
    before = f"\ufeff# M\u00fcller's\r\na:admin:{DIGESTS[0]}".encode()  # from another editor, without a last newline
    file.write_bytes(before)
    file.chmod(0o640)
    assert token_file.add(file, line) == 1
    assert file.read_bytes() == before + f"\n{line.line}\n".encode()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_file_behind_a_link_is_the_one_that_is_written(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text(f"a:admin:{DIGESTS[0]}\n")
    link.symlink_to(real)
    token_file.add(link, new_token("b", Role.READER)[1])
    assert link.is_symlink()
    assert len(parse_tokens(real.read_text())) == 2


def test_second_token_of_an_id_is_told_of(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    notes = [token_file.make("a", role="worker", runs="*", file=file)[1] for _ in range(2)]
    assert ["2 tokens" in note for note in notes] == [False, True]


def test_who_adds_at_the_same_time_takes_no_line_away_and_who_reads_sees_whole_files(tmp_path: Path) -> None:
    file, is_over, seen = tmp_path / "tokens", threading.Event(), []

    def read() -> None:
        while not is_over.is_set():
            if file.exists():
                seen.append(len(parse_tokens(file.read_text())))

    def add(number: int) -> None:
        for _ in range(10):
            token_file.add(file, new_token(f"w{number}", Role.WORKER)[1])

    with ThreadPoolExecutor(5) as pool:
        reading = pool.submit(read)
        for done in [pool.submit(add, number) for number in range(4)]:
            done.result(60)
        is_over.set()
        reading.result(60)
    assert len(parse_tokens(file.read_text())) == 40
    assert seen == sorted(seen)
    assert len(set(seen)) > 2


def test_who_dies_in_the_middle_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"a:admin:{DIGESTS[0]}\n")

    def fail(_descriptor: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        token_file.add(file, new_token("b", Role.WORKER)[1])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("tokens", f"a:admin:{DIGESTS[0]}\n")]


def test_no_option_of_the_server_takes_a_token() -> None:
    """Whoever lists the processes would see it."""
    assert "token" not in kedge_server("serve", "--help").stdout.lower()
