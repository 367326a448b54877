"""Commits and images as bytes: what comes back is what went, and what cannot be read is said."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge import optim, policies
from kedge.optim.controls import Change, Controls, StepValues
from kedge.wire.manifest import Manifest
from kedge_server.core.commits import (
    ArraySpec,
    Commit,
    Created,
    Ended,
    Held,
    Joined,
    Judgement,
    Progress,
    Rejected,
    Restored,
    RunConfig,
    Stepped,
    Ticked,
    Updated,
)
from kedge_server.core.image import RunImage
from kedge_server.core.values import ContributionHeader, PushResult
from kedge_server.storage.errors import StorageError
from kedge_server.storage.plain import decode, encode

PLATEAU = optim.ReduceLROnPlateau(0.1, patience=1, steps_per_epoch=2, min_lr=1e-5)
CHAIN = optim.ChainedScheduler(
    [optim.StepLR(0.1, 3), optim.SequentialLR([optim.LinearLR(), optim.ConstantLR(0.2)], [4])], tick="manual"
)
SCHEDULES: list[optim.Schedule] = [
    optim.ConstantLR(0.1, factor=1 / 3),
    optim.StepLR(0.1, 30, 0.3, steps_per_epoch=7),
    optim.ExponentialLR(0.1, 0.95),
    optim.MultiStepLR(0.1, [3, 5], 0.5),
    optim.ExponentialDecayLR(0.1, 10, 0.9, end_value=None),
    optim.CosineAnnealingLR(0.1, 7, last_epoch=2),
    optim.CosineAnnealingWarmRestarts(0.1, 7, 2),
    optim.PolynomialLR(0.1, 4, 2.5),
    optim.LinearLR(0.1),
    optim.CyclicLR(0.1, 0.7, 3, step_size_down=5, mode="exp_range", gamma=0.9),
    optim.OneCycleLR(0.1, epochs=3, steps_per_epoch=20, tick="manual"),
    optim.OneCycleLR(0.1, 50),
    optim.WarmupScheduler(0.1, 4),
    optim.WarmupCosineSchedule(0.1, 4, 40),
    optim.PiecewiseConstantSchedule(0.1, [2, 4], [0.1, 0.2, 0.3]),
    PLATEAU,
    CHAIN,
    optim.SequentialLR([optim.WarmupScheduler(), CHAIN.schedulers[0]], [9]),
]
RULES: list[optim.Rule] = [
    *(optim.SGD(0.1), optim.Momentum(0.1), optim.MomentumNesterov(0.1), optim.Lion(weight_decay=0.1), optim.Adam()),
    *(optim.AdamW(betas=(0.8, 0.99)), optim.Nadam(), optim.RAdam(), optim.Adamax(), optim.Yogi()),
    *(optim.AdaBelief(eps_root=1e-12), optim.RMSprop(centered=True), optim.Adagrad(), optim.Adadelta()),
    *(optim.Lamb(), optim.Lars(0.1), optim.Adafactor(), optim.Novograd(), optim.Adam(amsgrad=True, grad_clip_norm=3)),
    optim.Optax("adan", lr=PLATEAU, grad_clip_norm=2.0, b1=0.9, name_of="x", flag=True, none=None, some=(1, 1.0, "y")),
    optim.Optax("lbfgs", weight_decay=0.25),
]
POLICIES: list[policies.Policy] = [
    policies.Synchronous(4, timeout_seconds=1.5),
    policies.Synchronous(7, combine="trimmed_mean", trim_count=2, deterministic=False),
    policies.Asynchronous(),
    policies.Asynchronous(3, "inverse"),
    policies.BoundedStaleness(0),
    policies.Buffered(5, max_staleness=3, scaling="none", combine="median", deterministic=False),
]
ADMISSION = policies.Admission(max_norm=4.0, outlier_factor=3.0, quarantine_after=2)
JUDGEMENT = Judgement("w0", 3, 17, 5, 32, 0.1, 1, 2.5, False, 4, 0)
RESULT = PushResult(17, "rejected", "STALE_GRADIENT", "gradient is 9 steps old: pull", 6, 9)
GROUPS = (
    optim.Group("*.bias", weight_decay=0.0, lr=PLATEAU),
    optim.Group(("embed.*", "head"), frozen=True, name="ends"),
    optim.Group("conv*", grad_clip_norm=math.inf, lr=CHAIN),
)
MANIFEST = Manifest.from_specs([("w", (2, 3), "float32"), ("größe", (), "bfloat16")])
CONFIG = RunConfig(
    name="runs/r",
    manifest=MANIFEST,
    optimizer=optim.Lookahead(optim.AdaBelief(lr=1e-3), 7, 0.25, lr=CHAIN, reset_state=True),
    groups=GROUPS,
    created_at_seconds=1_790_000_000.123456,
    request_id="5f",
    durability="journal-sync",
    checkpoints=policies.Checkpoints(every_steps=100, keep_best=3, metric="accuracy", is_greater_better=True),
    block_elements=1 << 20,
    first_epoch=1 << 40,
)


def live_controls() -> Controls:
    """Controls after 40 steps with a worsening loss, changes by hand and ticks."""
    controls = Controls.begin(optim.AdamW(lr=PLATEAU).spec(), GROUPS)
    for step in range(40):
        controls = controls.after_step(1.0 + 0.1 * step, 32)
    controls = controls.changed("", Change(weight_decay=0.3, grad_clip_norm=math.inf), step=41)
    controls = controls.changed("*.bias", Change(lr=optim.ReduceLROnPlateau(0.2, "max")), step=41)
    controls = controls.ticked("conv*").ticked("conv*", 9)
    return controls.after_step(0.5, 16)


COMMITS: list[Commit] = [
    Created(CONFIG, POLICIES[0], ADMISSION, (ArraySpec("weights", "float32", (7,)),)),
    Created(
        CONFIG, POLICIES[5], ADMISSION, (), Progress(step=5, applied_count=20, loss=None, controls=live_controls())
    ),
    Joined("w0", 3, 10.0),
    Ended("w0", 3),
    Ended("w0", 3, "too many bad gradients", 600.0, "1"),
    Held(JUDGEMENT),
    Rejected(JUDGEMENT._replace(norm=None, loss=None), RESULT),
    Stepped(6, "QUORUM", (JUDGEMENT, JUDGEMENT), 0.1, 64, (StepValues(0.1, 0.0, 0.01, None, 3.0, 0),)),
    Updated("2", 7, "ends", Change(lr=CHAIN), POLICIES[2], ADMISSION),
    Ticked("3", "", 4),
    Restored("4", "100-231", 100),
]


def same(value: Any, other: Any) -> bool:
    """Equal, and of one type throughout: 1, 1.0 and True are equal to Python."""
    return type(value) is type(other) and repr(value) == repr(other)


@pytest.mark.parametrize("value", [*SCHEDULES, *RULES, *POLICIES, *COMMITS], ids=lambda value: type(value).__name__)
def test_value_comes_back_as_it_was(value: Any) -> None:
    read = decode(encode(value))
    assert read == value
    assert same(read, value)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda value: type(value).__name__)
def test_optimizer_with_a_schedule_comes_back(schedule: optim.Schedule) -> None:
    optimizer = optim.Lookahead(optim.SGD(lr=schedule), grad_clip_value=0.5)
    read = decode(encode(optimizer))
    assert same(read, optimizer)
    assert read.spec() == optimizer.spec()


def test_every_optimizer_and_schedule_of_the_package_is_tried_here() -> None:
    public = [getattr(optim, name) for name in optim.__all__]
    wanted = {kind for kind in public if isinstance(kind, type) and issubclass(kind, optim.Rule | optim.Schedule)}
    tried = {type(value) for value in (*SCHEDULES, *RULES)}
    assert wanted - {optim.Rule, optim.Schedule} == tried


def test_live_controls_come_back_and_go_on_alike() -> None:
    controls = live_controls()
    read = decode(encode(controls))
    assert same(read, controls)
    for step in range(30):
        controls, read = controls.after_step(0.1 * step, 8), read.after_step(0.1 * step, 8)
        assert read.values() == controls.values()


def test_image_comes_back_and_goes_on_alike() -> None:
    image = RunImage.create(COMMITS[0])  # type: ignore[arg-type]  # it is Created
    for commit in (COMMITS[2], COMMITS[5], COMMITS[7], COMMITS[8], COMMITS[4]):
        image.apply(commit, 1_790_000_100.0)
    state = image.state()
    read = decode(encode(state))
    assert read == state
    assert RunImage.of(read).state() == state


def test_header_with_a_digest_comes_back() -> None:
    header = ContributionHeader(
        worker_id="w", epoch=1, sequence=2, base_step=3, manifest_digest=bytes(range(256)), example_count=4, loss=None
    )
    assert same(decode(encode(header)), header)
    assert decode(encode(MANIFEST)).digest == MANIFEST.digest


atoms = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = st.integers() | st.text() | st.tuples(st.text(), st.integers())
values = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(keys, inner)
        | st.builds(Ended, st.text(), st.integers(), inner)
    ),
    max_leaves=20,
)


@given(values)
def test_any_mixture_comes_back(value: Any) -> None:
    assert same(decode(encode(value)), value)


def test_floats_are_exact() -> None:
    for value in (math.inf, -math.inf, 5e-324, 0.1, -0.0, 1e23, math.nextafter(1.0, 2.0)):
        assert same(decode(encode(value)), value)
    assert math.isnan(decode(encode(math.nan)))
    assert same(decode(encode(np.float64(0.1))), 0.1)


def test_bytes_are_compact_json_with_the_names_of_classes_and_fields() -> None:
    raw = encode(Rejected(JUDGEMENT, RESULT))
    assert raw == (
        b'{"Rejected":{"judgement":{"Judgement":{"worker_id":"w0","epoch":3,"sequence":17,"base_step":5,'
        b'"example_count":32,"loss":0.1,"staleness":1,"norm":2.5,"is_outlier":false,"clock":4,"bad_count":0}},'
        b'"result":{"PushResult":{"sequence":17,"outcome":"rejected","reason":"STALE_GRADIENT",'
        b'"message":"gradient is 9 steps old: pull","step":6,"staleness":9}},"is_for_values":false}}'
    )
    assert encode({(1, 2): [b"\x00\xff"]}) == b'{"items":[[[1,2],{"list":[{"bytes":"00ff"}]}]]}'


def test_fields_that_an_older_server_did_not_write_have_their_defaults() -> None:
    assert decode(b'{"Ended":{"worker_id":"w","epoch":4}}') == Ended("w", 4)
    assert decode(b'{"Synchronous":{"quorum":4}}') == policies.Synchronous(4)
    config = json.loads(encode(CONFIG))
    del config["RunConfig"]["checkpoints"]
    assert decode(json.dumps(config).encode()).checkpoints == policies.Checkpoints()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b'{"Ended":', "cannot be read"),
        (b'{"Ended":[]}', "cannot be read"),
        (b'{"list":3}', "cannot be read"),
        (b'{"bytes":"0g"}', "cannot be read"),
        (b'{"PosixPath":{}}', "has a 'PosixPath', which is not known here"),
        (b'{"os.system":{"command":"true"}}', "has a 'os.system', which is not known here"),
        (b'{"Ended":{"worker_id":"w","epoch":4,"colour":1}}', r"\['colour'\], which is not known here"),
        (b'{"Ended":{"epoch":4}}', r"lacks \['worker_id'\]"),
        (b'{"Joined":{},"Ended":{}}', "must have one"),
        (b"{}", "must have one"),
        (b'{"SGD":{"lr":-1.0}}', "lr is -1.0"),
    ],
)
def test_what_cannot_be_read_is_said(raw: bytes, says: str) -> None:
    with pytest.raises(StorageError, match=says):
        decode(raw)


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, np.zeros(3), Ended])
def test_value_of_another_class_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be stored"):
        encode((value,))
