import pytest

from kedge_server.security.roles import EVERYBODY, Caller, Role, parse_caller

ORDER = [Role.READER, Role.WORKER, Role.ADMIN]


def test_each_role_may_what_those_before_it_may() -> None:
    assert sorted(Role) == ORDER
    assert [role.text for role in ORDER] == ["reader", "worker", "admin"]


@pytest.mark.parametrize("name", ["", "Admin", "ADMIN", "admin ", "root", "worker,admin", "3", "__class__"])
def test_what_is_no_role_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(ValueError, match=r"^a role is admin, worker or reader$"):
        Role.parse(name)


@pytest.mark.parametrize(
    ("runs", "touched", "not_touched"),
    [
        (None, ["digits", "a", "x.y-z_1"], []),
        ("*", ["digits", "a"], []),
        ("digits", ["digits"], ["digits2", "adigits", "digit", "Digits", "digits.", ""]),
        ("exp-*", ["exp-", "exp-1", "exp-a.b"], ["exp", "myexp-1", "Exp-1", "digits"]),
        ("*-small", ["a-small", "-small"], ["a-small2", "small"]),
        ("a*c*e", ["ace", "abcde", "accee"], ["acd", "bace", "acef"]),
        ("digits,exp-*", ["digits", "exp-2"], ["digits,exp-2", "other"]),
        ("a.c", ["a.c"], ["abc"]),
        ("**", ["a", ""], []),
    ],
)
def test_runs_are_touched_by_whole_ids(runs: str | None, touched: list[str], not_touched: list[str]) -> None:
    caller = parse_caller("a", "worker", runs)
    assert [caller.may_touch(run) for run in touched] == [True] * len(touched)
    assert [caller.may_touch(run) for run in not_touched] == [False] * len(not_touched)


@pytest.mark.parametrize(
    "runs", ["", ",", "a,", ",a", "a,,b", "a b", "a?", "[ab]", "a/b", "ä", "a\n", "x" * 64, "runs/a"]
)
def test_what_can_be_no_pattern_is_refused(runs: str) -> None:
    with pytest.raises(ValueError, match="joined by commas"):
        parse_caller("a", "worker", runs)


@pytest.mark.parametrize("identity", ["a", "0", "worker-1", "a.b_c-d", "x" * 63])
def test_ids(identity: str) -> None:
    assert parse_caller(identity, "reader") == Caller(identity, Role.READER, ("*",))


@pytest.mark.parametrize("identity", ["", "-a", ".a", "_a", "x" * 64, "a b", "a:b", "a/b", "ä", "a\n", "a\x00"])
def test_what_is_no_id_is_refused(identity: str) -> None:
    with pytest.raises(ValueError, match="an id has 1 to 63"):
        parse_caller(identity, "reader")


def test_nobody_who_is_asked_can_be_everybody() -> None:
    with pytest.raises(ValueError, match="an id has"):
        parse_caller(EVERYBODY.identity, "admin")
