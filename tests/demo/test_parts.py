"""The demo's parts that are pure: the reward, the loss, the verdict, the charts, the page, the lines."""

from __future__ import annotations

import io
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from weightwire.demo import charts, model, progress, prove, report, task
from weightwire.demo.completions import StockPolicy
from weightwire.demo.serving import Completion, Weights
from weightwire.demo.train import Step, policy_gradient_loss, token_logprobs


def step(number: int, **changes) -> Step:
    phases = {"sample": 0.2, "learn": 0.1, "begin": 0.01, "stage": 0.02, "seal": 0.01, "commit": 0.03}
    values = {
        "reward": 0.5,
        "mismatch": 1e-6,
        "kind": "dense",
        "nbytes": 1_200_000,
        "seconds": phases,
        "pause": 0.013,
        **changes,
    }
    return Step(step=number, version=number, **values)


def recording(version: int = 1, logprob: float = -0.5) -> prove.Recording:
    answer = Completion(model=f"policy@{version}", prompt="1", tokens=(3, 4), logprobs=(-0.25, logprob))
    return prove.Recording(version=version, weights=Weights(checkpoint=Path("nowhere")), answers=(answer,))


def test_counting_is_rewarded_and_nothing_else():
    assert task.rewards("9", list("012")) == [1.0, 1.0, 1.0]
    assert task.rewards("1", list("111")) == [0.0, 0.0, 0.0]
    assert task.rewards("1", ["<pad>", "<pad>", "2"]) == [0.0, 0.0, 0.0]


def test_the_vocabulary_is_one_token_a_digit():
    assert model.decode(model.encode(task.DIGITS)) == list(task.DIGITS)


def test_the_loss_raises_what_was_rewarded():
    logprobs = torch.log(torch.tensor([[0.5, 0.5]])).requires_grad_()
    policy_gradient_loss(logprobs, torch.tensor([[1.0, 0.0]])).backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0, 0] < 0 < logprobs.grad[0, 1]


def test_equal_rewards_teach_nothing():
    logprobs = torch.log(torch.tensor([[0.5, 0.5]]))
    assert policy_gradient_loss(logprobs, torch.ones(1, 2)) == 0


def test_logprobs_are_those_of_the_sampled_tokens():
    policy = model.make_policy(seed=0)
    with torch.no_grad():
        found = token_logprobs(policy, [Completion(model="policy", prompt="1", tokens=(3, 4), logprobs=())])
        full = policy(input_ids=torch.tensor([[*model.encode("1"), 3, 4]])).logits.log_softmax(-1)
    torch.testing.assert_close(found, torch.stack([full[0, 0, 3], full[0, 1, 4]])[None])


def test_the_same_answers_pass():
    verdict = prove.compare(recording(), recording().answers)
    assert verdict.passed
    assert str(verdict).startswith("PASS  version 1: all 2 ")


@pytest.mark.parametrize("logprob", [math.nextafter(-0.5, 0), math.nan])
def test_the_last_bit_of_a_logprob_fails(logprob):
    verdict = prove.compare(recording(), recording(logprob=logprob).answers)
    assert not verdict.passed
    assert (verdict.tokens_differing, verdict.logprobs_differing) == (0, 1)


def test_versions_that_answer_alike_prove_nothing():
    verdict = prove.compare(recording(2), recording(2).answers, same_as=1)
    assert not verdict.passed
    assert str(verdict).startswith("FAIL  version 2: it answers as version 1 does")


def test_versions_that_answer_alike_are_found_whoever_answers():
    versions = [recording(1), recording(2), recording(3, logprob=-0.7)]
    assert [prove._twin(version, versions) for version in versions] == [2, 1, None]


def test_only_the_adapter_is_trained_and_it_begins_as_nothing():
    base, policy = model.make_policy(seed=0), model.adapted(model.make_policy(seed=0))
    assert all("lora_" in name for name, parameter in policy.named_parameters() if parameter.requires_grad)
    ids = torch.tensor([model.encode("123")])
    with torch.no_grad():
        assert torch.equal(policy(input_ids=ids).logits, base(input_ids=ids).logits)


def test_a_fresh_server_has_the_adapter_from_its_folder(tmp_path):
    weights = Weights(checkpoint=tmp_path / "version-0", adapter=tmp_path / "version-7")
    command = StockPolicy("adapter", weights, tmp_path)._server._command
    assert command[command.index("--model") + 1] == str(tmp_path / "version-0")
    assert command[command.index("--lora-modules") + 1] == f"policy={tmp_path / 'version-7'}"
    assert {"--served-model-name=base", "--enable-lora", "--max-lora-rank=16"} <= set(command)
    dense = StockPolicy("dense", Weights(checkpoint=tmp_path / "version-7"), tmp_path)._server._command
    assert "--served-model-name=policy" in dense
    assert not any("lora" in argument for argument in dense)


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_ticks_cover_the_values(top):
    ticks = charts.nice_ticks(top)
    assert ticks[0] == 0
    assert ticks[-1] >= top * (1 - 1e-6)
    assert 3 <= len(ticks) <= 6
    assert ticks == sorted(ticks)


def test_bars_are_stacked_within_the_axes():
    chart = charts.stacked_bars("", {1: {"a": 1.0, "b": 3.0}, 2: {"a": 2.0, "b": 0.0}}, unit="s")
    first, second = chart.bars[:2]
    assert first.y == pytest.approx(second.y + second.height)
    assert second.height == pytest.approx(3 * first.height)
    assert all(chart.left <= bar.x <= bar.x + bar.width <= chart.right for bar in chart.bars)
    assert all(chart.top <= bar.y <= chart.bottom for bar in chart.bars)


@pytest.mark.parametrize("number", [3, 30, 500])
def test_the_page_is_whole_and_loads_nothing(number):
    verdicts = [prove.compare(recording(), recording().answers)]
    page = report.render(
        kind="transformers", mode="adapter", steps=[step(n) for n in range(1, number + 1)], verdicts=verdicts
    )
    loads = {"link", "script", "img", "iframe", "object", "image", "use"}
    tags, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))  # type: ignore[method-assign]
    parser.feed(page)
    assert not loads & {tag for tag, _ in tags}
    assert not any({"src", "href", "xlink:href"} & attrs.keys() for _, attrs in tags)
    assert "url(" not in page
    assert "@import" not in page
    assert "update: a LoRA adapter of rank 16" in page
    assert [tag for tag, _ in tags].count("svg") == 4
    assert not re.search(r"\b(nan|inf)\b", page)


def test_plain_lines_are_aligned(capsys):
    with progress.PlainLines() as lines:
        lines.step(step(1))
        lines.step(step(30, reward=1.0))
    printed = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in printed}) == 1


def test_the_live_table_fits_80_columns_and_ends_with_every_row():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=10, color_system=None)
    with progress.LiveTable(console) as table:
        for number in range(1, 31):
            table.step(step(number, pause=0.123))
    printed = out.getvalue()
    assert "…" not in printed
    last = printed.rpartition("mismatch")[2]
    assert [line.split()[0] for line in last.splitlines() if line.split()[1:2] == ["0.500"]] == [
        str(number) for number in range(1, 31)
    ]


def test_json_lines_hold_the_whole_step(capsys):
    progress.JsonLines(sys.stdout).step(step(7))
    event = msgspec.json.decode(capsys.readouterr().out)
    assert event.pop("event") == "step"
    assert msgspec.convert(event, Step) == step(7)
