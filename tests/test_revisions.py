"""Which revisions may be forgotten: never one that a client may still hand to a request, and in the end all others."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from support.cases import cases
from weightwire.errors import AdapterNotFound, StateError, VersionError
from weightwire.revisions import Revision, Revisions

CLIENTS = 3
_updates = itertools.count(1)


def loaded(revisions: Revisions, name: str, version: int) -> Revision:
    revision = revisions.open(name, version, f"{next(_updates):x}")
    revisions.commit(revision)
    return revision


def labels(revisions: Revisions) -> list[str]:
    return [revision.label for revision in revisions.listed()]


def test_the_newest_and_those_kept_are_listed_the_newest_last() -> None:
    revisions = Revisions(keep=2)
    for version in range(1, 6):
        loaded(revisions, "policy", version)
    loaded(revisions, "other", 1)
    assert labels(revisions) == ["policy@3", "policy@4", "policy@5", "other@1"]
    assert revisions.status() == [
        {"name": "policy", "version": 5, "versions": [3, 4, 5]},
        {"name": "other", "version": 1, "versions": [1]},
    ]


def test_versions_of_a_name_only_grow() -> None:
    revisions = Revisions()
    loaded(revisions, "policy", 7)
    for version in (6, 7):
        with pytest.raises(VersionError, match=r"not newer than 7.*Load version 8"):
            revisions.open("policy", version, "1")
    assert revisions.open("other", 1, "1").label == "other@1"


def test_versions_grow_also_after_an_unload_since_caches_know_labels() -> None:
    revisions = Revisions()
    loaded(revisions, "policy", 7)
    revisions.report(0, 1, [])
    revisions.unload("policy")
    assert labels(revisions) == []
    with pytest.raises(VersionError, match="not newer than 7"):
        revisions.open("policy", 7, "1")
    with pytest.raises(AdapterNotFound, match="Loaded are: none"):
        revisions.unload("policy")


def test_a_commit_that_nobody_saw_is_undone_and_its_version_can_come_again() -> None:
    revisions = Revisions()
    loaded(revisions, "policy", 7)
    newest = loaded(revisions, "policy", 8)
    assert revisions.revert(newest)
    assert labels(revisions) == ["policy@7"]
    assert not revisions.revert(newest)
    loaded(revisions, "policy", 8)


def test_a_commit_that_was_listed_is_undone_and_its_version_is_spent() -> None:
    revisions = Revisions()
    loaded(revisions, "policy", 7)
    newest = loaded(revisions, "policy", 8)
    revisions.report(0, 1, [])
    assert revisions.revert(newest)
    assert labels(revisions) == ["policy@7"]
    with pytest.raises(VersionError, match="not newer than 8"):
        revisions.open("policy", 8, "1")


def test_what_is_held_is_found_by_its_version_until_it_is_freed() -> None:
    revisions = Revisions(keep=1)
    first, *_ = [loaded(revisions, "policy", version) for version in (1, 2, 3)]
    assert revisions.find("policy", 1) is first
    revisions.report(0, 1, [first.id])  # from here on it is not listed any more, and in flight
    assert revisions.find("policy", 1) is first
    revisions.report(0, 1, [])
    assert revisions.free() == [first]
    with pytest.raises(
        VersionError, match=r"version 1 of adapter 'policy'.* is not held here: 2, 3\. Publish the whole"
    ):
        revisions.find("policy", 1)
    with pytest.raises(VersionError, match=r"version 2 of adapter 'other'.* is not held here: none"):
        revisions.find("other", 2)


def test_of_two_of_one_version_the_one_that_was_not_undone_is_found() -> None:
    revisions = Revisions()
    assert revisions.revert(loaded(revisions, "policy", 1))
    again = loaded(revisions, "policy", 1)
    assert revisions.find("policy", 1) is again


def test_an_id_that_is_taken_is_not_given_again() -> None:
    revisions = Revisions()
    revisions.commit(revisions.open("policy", 1, "abc"))
    with pytest.raises(StateError, match="taken"):
        revisions.open("other", 1, "abc")


def test_ids_fit_into_32_bits_and_leave_the_first_ones_to_files() -> None:
    revisions = Revisions()
    for update in ("0", "f" * 32, "7fffffff", "7fefffff"):
        assert 1 << 20 <= revisions.open("policy", 1, update).id < 1 << 31


class Clients(RuleBasedStateMachine):
    """Clients with a table each, and requests in flight that hold what a table gave them."""

    def __init__(self) -> None:
        super().__init__()
        self.revisions = Revisions(keep=1)
        self.tables: list[list[Revision]] = [[] for _ in range(CLIENTS)]
        self.in_flight: list[list[Revision]] = [[] for _ in range(CLIENTS)]
        self.freed: set[Revision] = set()
        self.all: set[Revision] = set()
        self.version = 0
        for client in range(CLIENTS):
            self.refresh(client)

    @rule(name=st.sampled_from("ab"))
    def load(self, name: str) -> None:
        self.version += 1
        self.all.add(loaded(self.revisions, name, self.version))

    @rule(name=st.sampled_from("ab"))
    def load_and_undo(self, name: str) -> None:
        self.version += 1
        revision = loaded(self.revisions, name, self.version)
        self.all.add(revision)
        self.revisions.revert(revision)

    @rule(name=st.sampled_from("ab"))
    def unload(self, name: str) -> None:
        if any(revision.name == name for revision in self.revisions.listed()):
            self.revisions.unload(name)

    @rule(client=st.integers(0, CLIENTS - 1))
    def refresh(self, client: int) -> None:
        in_use = {revision.id for revision in self.tables[client] + self.in_flight[client]}
        self.revisions.report(client, CLIENTS, in_use)
        self.freed |= set(self.revisions.free())
        self.tables[client] = self.revisions.listed()

    @rule(client=st.integers(0, CLIENTS - 1), choice=st.integers(0, 9))
    def request(self, client: int, choice: int) -> None:
        if table := self.tables[client]:
            self.in_flight[client].append(table[choice % len(table)])

    @rule(client=st.integers(0, CLIENTS - 1))
    def finish(self, client: int) -> None:
        if self.in_flight[client]:
            self.in_flight[client].pop(0)

    @invariant()
    def nothing_in_use_is_freed(self) -> None:
        for client in range(CLIENTS):
            assert not self.freed & {*self.tables[client], *self.in_flight[client]}

    def teardown(self) -> None:
        # When all is finished and everybody has reported, nothing but what is listed is left.
        self.in_flight = [[] for _ in range(CLIENTS)]
        for client in (*range(CLIENTS), *range(CLIENTS)):
            self.refresh(client)
        assert self.all - self.freed == set(self.revisions.listed())


Clients.TestCase.settings = settings(max_examples=cases(200), stateful_step_count=40, deadline=None)
TestClients = Clients.TestCase
