"""The proof: what the updated engine answered, against what a fresh engine answers that has the weights from disk."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from weightwire.demo import model, task
from weightwire.demo.serving import Completion, EngineKind, Mode, Serving, Weights, fresh

__all__ = ["Recording", "Verdict", "chosen_versions", "prove", "record"]


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """A version: its weights on disk, and what the updated engine answered while it was live."""

    version: int
    weights: Weights
    answers: tuple[Completion, ...]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Of the tokens compared, how many differ, or have another log-probability, and by how much at most."""

    version: int
    compared: int
    tokens_differing: int
    logprobs_differing: int
    largest_difference: float
    sample: str
    same_as: int | None
    """Another version with the same answers: if so, the comparison shows nothing."""

    @property
    def passed(self) -> bool:
        return not self.tokens_differing and not self.logprobs_differing and self.same_as is None

    def __str__(self) -> str:
        if self.passed:
            found = f"all {self.compared} greedy tokens and their logprobs equal a fresh engine's"
        elif self.same_as is not None:
            found = f"it answers as version {self.same_as} does, so nothing was updated"
        else:
            found = (
                f"of {self.compared} greedy tokens, {self.tokens_differing} differ from a fresh engine's and"
                f" {self.logprobs_differing} logprobs do, by up to {self.largest_difference:.3g}"
            )
        return f"{'PASS' if self.passed else 'FAIL'}  version {self.version}: {found} ({self.sample})"


def chosen_versions(steps: int) -> tuple[int, ...]:
    """The first, the middle and the last.

    >>> chosen_versions(30)
    (1, 15, 30)
    """
    return (1, (steps + 1) // 2, steps)


def record(version: int, policy: Any, mode: Mode, base: Path, serving: Serving, folder: Path) -> Recording:
    """Keep the weights of the version that is live now, and its greedy answers. `base` is the checkpoint that an
    adapter is for."""
    saved = model.save(policy, folder / f"version-{version}")
    weights = Weights(checkpoint=base, adapter=saved) if mode == "adapter" else Weights(checkpoint=saved)
    return Recording(version=version, weights=weights, answers=_greedy(serving))


def prove(
    recordings: Sequence[Recording], kind: EngineKind, mode: Mode, folder: Path
) -> Generator[Verdict, None, None]:
    """Load each version into a fresh engine of its own, ask it the same, and compare exactly."""
    with ExitStack() as stack:
        # Started together: most of a start runs on one core.
        engines = [stack.enter_context(fresh(kind, mode, recording.weights, folder)) for recording in recordings]
        for recording, engine in zip(recordings, engines, strict=True):
            engine.wait_until_ready()
            yield compare(recording, _greedy(engine), same_as=_twin(recording, recordings))


def compare(recording: Recording, expected: Sequence[Completion], *, same_as: int | None = None) -> Verdict:
    """The verdict on answers that ought to be `expected`."""
    pairs = list(zip(_said(recording.answers), _said(expected), strict=True))
    differences = [abs(served_logprob - logprob) for (_, served_logprob), (_, logprob) in pairs]
    first = recording.answers[0]
    return Verdict(
        version=recording.version,
        compared=len(pairs),
        tokens_differing=sum(token != wanted for (token, _), (wanted, _) in pairs),
        logprobs_differing=sum(difference != 0.0 for difference in differences),
        largest_difference=max(differences),
        sample=f"{first.model}: {first.prompt} -> {''.join(model.decode(first.tokens))}",
        same_as=same_as,
    )


def _said(answers: Iterable[Completion]) -> list[tuple[int, float]]:
    """Every token with its log-probability."""
    return [pair for answer in answers for pair in zip(answer.tokens, answer.logprobs, strict=True)]


def _twin(recording: Recording, others: Iterable[Recording]) -> int | None:
    said = _said(recording.answers)
    return next((o.version for o in others if o.version != recording.version and _said(o.answers) == said), None)


def _greedy(serving: Serving) -> tuple[Completion, ...]:
    # One at a time: which requests share a batch is a matter of timing, and may change the last bits of a logprob.
    return tuple(serving.complete([prompt], n=1, length=task.LENGTH, temperature=0.0)[0] for prompt in task.PROMPTS)
