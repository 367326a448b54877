"""A coordinator that a test calls by hand, whose commits are kept, and that can be killed at any moment."""

from typing import Any

from coordinator_hand import DIGEST, Hand

from kedge import optim
from kedge.policies import Admission, Policy
from kedge.wire.manifest import Manifest
from kedge_server.core.commits import Commit, Created, Held, Judgement, RunConfig, Stepped, Updated
from kedge_server.core.contributions import Contribution, Round
from kedge_server.core.coordinator import Bounds, Coordinator
from kedge_server.core.image import ImageState, LeaseState, RunImage
from kedge_server.storage.plain import decode, encode

EPOCH_SECONDS = 2.0**30
"""Seconds since 1970 when the time of a hand is 0."""

CONFIG = RunConfig(
    name="runs/r",
    manifest=Manifest.from_specs([("w", (1,), "float32")]),
    optimizer=optim.SGD(lr=0.1),
    created_at_seconds=EPOCH_SECONDS,
    durability="journal",
    block_elements=1,
    first_epoch=1,
)


class DurableHand(Hand):
    """A hand with an image of what is written. Everything is written at once, but steps only when `step` is called."""

    def __init__(
        self, policy: Policy, *workers: str, admission: Admission | None = None, contribution_limit: int = 64
    ) -> None:
        self.image = RunImage.create(Created(CONFIG, policy, admission or Admission(), ()))
        self._contribution_limit = contribution_limit
        super().__init__(policy, *workers, admission=admission, contribution_limit=contribution_limit)

    def _commit(self, commit: Commit) -> None:
        self.image.apply(commit, EPOCH_SECONDS + self.now)

    def hold(self, contribution: Contribution) -> Contribution:
        """Its worker is told that it is held."""
        assert contribution.is_held
        assert contribution.judgement is not None
        self._commit(Held(contribution.judgement))
        return contribution

    def step(self) -> list[Round]:
        """Applies and writes all rounds that have closed."""
        closed = self.coordinator.take_closed()
        for each in closed:
            self._commit(_stepped(each))
            self.coordinator.applied(each, is_lookahead_sync=False)
        return closed

    def update(self, policy: Policy, request_id: str = "") -> None:
        """Another policy, written after the rounds that it closed."""
        self.set_policy(policy)
        self.step()
        self._commit(Updated(request_id, self.coordinator.closed_step + 1, policy=policy))

    def crash(self, *, now: float | None = None, down_seconds: float = 0.0) -> None:
        """Everything but the image is gone. Its successor's clock begins wherever it likes, at `now`."""
        died_at, lives_at = EPOCH_SECONDS + self.now, self.now if now is None else now
        self.image = RunImage.of(decode(encode(self.image.state())))
        self.told.clear()
        self.now = lives_at
        self.coordinator = Coordinator(
            "runs/r",
            digest=DIGEST,
            policy=self.image.policy,
            admission=self.image.admission,
            bounds=Bounds(8, self._contribution_limit),
            first_epoch=1,
            tell=self._tell,
            commit=self._commit,
        )
        self.coordinator.resume(self.image, make=_made_of, now_seconds=lives_at, time_seconds=died_at + down_seconds)

    def again(self, worker: str, epoch: int, sequence: int, **about: Any) -> Contribution:
        """Sends a contribution of this sequence, whatever was sent before."""
        return self.submit(self.header(worker, epoch, sequence, **about))

    def result_of(self, worker: str, epoch: int, sequence: int) -> tuple[str, str, int]:
        """What a repetition is answered."""
        found = self.again(worker, epoch, sequence, base_step=0).result
        assert found is not None
        return found.outcome, found.reason, found.step

    def state(self) -> ImageState:
        """The image's."""
        return self.image.state()

    def lease_state(self, worker: str) -> LeaseState:
        """A live worker's lease, as the image has it."""
        return next(lease for lease in self.state().live if lease.worker_id == worker)


def _stepped(closed: Round) -> Stepped:
    loss, example_count = closed.loss()
    judgements = [c.judgement for c in closed.contributions if c.judgement is not None]
    assert len(judgements) == len(closed.contributions)
    return Stepped(
        step=closed.step,
        reason=closed.close_reason,
        judgements=tuple(judgements),
        loss=loss,
        loss_example_count=example_count,
        values=(),
    )


def _made_of(contribution: Contribution) -> Contribution:
    made = Contribution(contribution.header, contribution.staleness, contribution.result)
    if contribution.result is None:
        made.judgement = Judgement.of_held(contribution.header, contribution.staleness)
    return made
