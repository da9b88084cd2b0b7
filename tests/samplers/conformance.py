"""What every sampler must keep to, whoever wrote it: a row is its own, and what is promised of a plan holds.

``test_conformance.py`` runs CHECKS for each registered sampler, with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import annotated_types
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support import strange_rows as strange
from vllm_entropix import ConfigError
from vllm_entropix.distribution.attention import AttentionStatistics
from vllm_entropix.distribution.backend import Backend
from vllm_entropix.rows import table
from vllm_entropix.rows.batch import BatchSampler
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.state import PositionRing
from vllm_entropix.samplers import registry

PROPERTY = settings(derandomize=True, deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
VOCABULARIES = (3, 17, 64, 300)
GREATEST = 1e4  # of a setting without a bound
seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Request:
    """What one sequence asks for.

    Attributes:
        sampler: its name.
        base: temperature, top_p, top_k and min_p of the request.
        said: settings of its sampler, as ``vllm_xargs`` name them.
    """

    sampler: str
    base: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 0.0)
    said: Mapping[str, float] = field(default_factory=dict)


def sequence(batch: BatchSampler, request: Request) -> table.Sequence:
    """The request as the engine's adapter hands it to a batch."""
    parsed = registry.parse_request({"samplers": request.sampler, **request.said})
    own = dict(zip(table.BASE, request.base, strict=True))
    constants = batch.samplers[request.sampler].numbers_of_request(parsed, own)
    return table.Sequence(constants, True, True, True, 1, request.sampler, request.base)


class Step:
    """A batch sampler with a sequence of each request.

    Args:
        requests: one per sequence.
        reference: compute in PyTorch, and not by the CPU's kernels.
        clarification: token ids that may be forced.
        drafts: rows per sequence beyond the first.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        reference: bool = False,
        clarification: tuple[int, ...] | None = None,
        drafts: int = 0,
    ) -> None:
        config = registry.server_settings().from_dict({"trace": {"alternatives": 0}})
        self.batch = BatchSampler(config, len(requests), clarification, "cpu", drafts)
        if reference:
            self.batch.backend = Backend("cpu")
        for number, request in enumerate(requests):
            self.batch.add(str(number), sequence(self.batch, request))
        self.slots = self.batch.sequences.slots_of(map(str, range(len(requests))), len(requests))

    def draw(
        self,
        logits: Tensor,
        attention: Tensor | None = None,
        position: int = 10,
        fed: Tensor | None = None,
        draft_rows: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and records of ``logits [sequences · draft_rows, vocab]``; a sequence's rows stand together.

        Args:
            logits: left as they are.
            attention: the four statistics, ``[4, rows]``.
            position: of the first row of each sequence.
            fed: token fed at each row.
            draft_rows: of each sequence.
        """
        owner, place = (torch.arange(len(logits)) // draft_rows, torch.arange(len(logits)) % draft_rows)
        rows = Rows(
            torch.from_numpy(self.slots)[owner],
            self.slots,
            position + place,
            torch.zeros(len(logits), dtype=torch.int64) if fed is None else fed,
            torch.ones(len(logits), dtype=torch.bool),
            owner,
            place if draft_rows > 1 else None,
            draft_rows,
        )

        def measure(_: Rows, wanted: Tensor) -> AttentionStatistics:
            assert attention is not None
            return AttentionStatistics(*attention.masked_fill(~wanted, torch.nan), wanted)

        written = logits.clone()
        records = self.batch.apply(written, rows, None if attention is None else measure)
        assert records is not None
        return written, records[:, 1:]  # without the slots

    def spy(self, name: str) -> list[tuple[Any, Any]]:
        """What a sampler of the batch is shown and plans, from now on."""
        seen: list[tuple[Any, Any]] = []
        sampler = self.batch.samplers[name]
        plan = sampler.plan

        def spied(rows: Any) -> Any:
            seen.append((rows, plan(rows)))
            return seen[-1][1]

        sampler.plan = spied  # type: ignore[method-assign]
        return seen

    def remembers(self) -> list[PositionRing]:
        """All that is kept of sequences by position."""
        holders = (self.batch, self.batch.clarification)
        return [kept for holder in holders if holder for kept in vars(holder).values() if isinstance(kept, PositionRing)]


def draw(requests: Sequence[Request], logits: Tensor, attention: Tensor | None = None, reference: bool = False) -> Tensor:
    """Log-probabilities of a row per request."""
    return Step(requests, reference).draw(logits, attention)[0]


# --- examples ---------------------------------------------------------------------------------------------------------


def ranges(sampler: str) -> Iterator[tuple[str | None, str, float, float, type]]:
    """(key of requests or None, setting, least, greatest, type) of each number in the sampler's section."""
    one = registry.registry().classes[sampler]
    if sampler not in registry.server_settings().model_fields:
        return
    keys = {name: key for key, name in registry.request_keys(one)}
    for name, info in one.Settings.model_fields.items():
        if info.annotation not in (int, float):
            continue
        low, high = -GREATEST, GREATEST
        for bound in info.metadata:
            if isinstance(bound, annotated_types.Ge | annotated_types.Gt):
                low = float(bound.ge if isinstance(bound, annotated_types.Ge) else np.nextafter(bound.gt, np.inf))  # type: ignore[call-overload]
            elif isinstance(bound, annotated_types.Le | annotated_types.Lt):
                high = float(bound.le if isinstance(bound, annotated_types.Le) else np.nextafter(bound.lt, -np.inf))  # type: ignore[call-overload]
        yield keys.get(name), name, low, high, info.annotation


def random_request(rng: np.random.Generator, sampler: str, vocabulary: int) -> Request:
    """With own parameters, and with settings of its own now and then."""
    said = {
        key: kind(rng.choice([low, high, rng.uniform(low, high), rng.uniform(max(low, -3), min(high, 3))]))
        for key, _, low, high, kind in ranges(sampler)
        if key is not None and rng.random() < 0.7
    }
    # No top_p that a sum of equal shares would meet, where rounding decides.
    base = (rng.choice([0.05, 0.7, 1.0, 2.5]), rng.choice([0.3171, 0.9137, 1.0]), rng.choice([1, 4, vocabulary]))
    return Request(sampler, (*map(float, base), float(rng.choice([0.0, 0.03, 0.31]))), said)


def random_logits(rng: np.random.Generator, rows: int, vocabulary: int) -> Tensor:
    """float32 rows from nearly even to nearly certain; some tokens are masked."""
    values = rng.normal(size=(rows, vocabulary)) * rng.choice([0.01, 1.0, 5.0], size=(rows, 1))
    values[:, :2] += rng.choice([0.0, 8.0], size=(rows, 1))
    values[:, 1:][rng.random((rows, vocabulary - 1)) < rng.choice([0.0, 0.3, 0.9], size=(rows, 1))] = -np.inf
    return torch.tensor(values, dtype=torch.float32)


def random_attention(rng: np.random.Generator, rows: int) -> Tensor:
    """The four statistics, ``[4, rows]``."""
    return torch.tensor(rng.random((4, rows)) * [[10.0], [4.0], [0.3], [8.0]], dtype=torch.float32)


# --- what holds -------------------------------------------------------------------------------------------------------


def rows_do_not_influence_one_another(name: str) -> None:
    """A row alone, among rows of its sampler, and among rows of all others: the same bits."""

    @PROPERTY
    @given(seeds, st.integers(1, 5), st.sampled_from(VOCABULARIES), st.booleans())
    def check(seed: int, rows: int, vocabulary: int, reference: bool) -> None:
        rng = np.random.default_rng(seed)
        mine = [random_request(rng, name, vocabulary) for _ in range(rows)]
        others = [random_request(rng, other, vocabulary) for other in registry.names() if other != name for _ in range(2)]
        logits, attention = random_logits(rng, rows + len(others), vocabulary), random_attention(rng, rows + len(others))
        alone = [Step([mine[row]], reference).draw(logits[[row]], attention[:, [row]]) for row in range(rows)]
        among = Step(mine, reference).draw(logits[:rows], attention[:, :rows])
        order = torch.from_numpy(rng.permutation(rows + len(others)))
        step = Step([[*mine, *others][place] for place in order.tolist()], reference)
        mixed = [part[order.argsort()][:rows] for part in step.draw(logits[order], attention[:, order])]
        for expected, together, with_others in zip(zip(*alone, strict=True), among, mixed, strict=True):
            torch.testing.assert_close(together, torch.cat(expected), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(with_others, torch.cat(expected), rtol=0, atol=0, equal_nan=True)

    check()


def rows_are_distributions(name: str) -> None:
    """Each sums to 1, and holds no token that was masked."""

    @PROPERTY
    @given(seeds, st.integers(1, 6), st.sampled_from(VOCABULARIES))
    def check(seed: int, rows: int, vocabulary: int) -> None:
        rng = np.random.default_rng(seed)
        requests = [random_request(rng, name, vocabulary) for _ in range(rows)]
        logits, attention = random_logits(rng, rows, vocabulary), random_attention(rng, rows)
        for reference in (False, True):
            written = draw(requests, logits, attention, reference)
            torch.testing.assert_close(written.double().exp().sum(-1), torch.ones(rows).double(), rtol=1e-5, atol=0)
            assert (written[logits == -torch.inf] == -torch.inf).all()

    check()


def strange_rows_degrade_alike(name: str) -> None:
    """Rows without a softmax give one token; kernels and PyTorch give the same everywhere."""

    @PROPERTY
    @given(seeds, strange.logits(vocabularies=(1, 2, 5, 64, 300)))
    def check(seed: int, logits: Tensor) -> None:
        rng = np.random.default_rng(seed)
        requests = [random_request(rng, name, logits.shape[1]) for _ in logits]
        attention = random_attention(rng, len(logits))
        got, want = (draw(requests, logits, attention, reference) for reference in (False, True))
        strange.assert_same_draws(got, want, logits)

    check()


def kernels_equal_pytorch(name: str) -> None:
    """The CPU's kernels and PyTorch give the same distributions and records, but for rounding."""

    @PROPERTY
    @given(seeds, st.sampled_from(VOCABULARIES))
    def check(seed: int, vocabulary: int) -> None:
        rng = np.random.default_rng(seed)
        requests = [random_request(rng, name, vocabulary) for _ in range(6)]
        logits, attention = random_logits(rng, 6, vocabulary), random_attention(rng, 6)
        (got, records), (want, expected) = (Step(requests, reference).draw(logits, attention) for reference in (False, True))
        torch.testing.assert_close(got.exp(), want.exp(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(records, expected, rtol=1e-4, atol=1e-5, equal_nan=True)

    check()


def drafts_equal_steps(name: str) -> None:
    """Rows of drafts, which one step verifies, are those of as many steps: forced tokens, too."""

    @PROPERTY
    @given(seeds, st.sampled_from(VOCABULARIES))
    def check(seed: int, vocabulary: int) -> None:
        rng = np.random.default_rng(seed)
        count, drafts = 2, 3
        requests = [random_request(rng, name, vocabulary) for _ in range(count)]
        # Nearly even rows, so that a sampler that forces tokens has reason to.
        logits = random_logits(rng, count * drafts, vocabulary) * float(rng.choice([1.0, 1e-3]))
        attention = random_attention(rng, count * drafts)
        fed = torch.from_numpy(rng.integers(3, size=count * drafts))
        at_once = Step(requests, clarification=(1, 2), drafts=drafts - 1).draw(logits, attention, fed=fed, draft_rows=drafts)
        step = Step(requests, clarification=(1, 2), drafts=drafts - 1)
        for place in range(drafts):
            one = slice(place, None, drafts)
            expected = step.draw(logits[one], attention[:, one], 10 + place, fed[one])
            for got, want in zip(at_once, expected, strict=True):
                torch.testing.assert_close(got[one], want, rtol=0, atol=0, equal_nan=True)

    check()


def forks_continue_as_their_parents(name: str) -> None:
    """A sequence that begins with what another remembers, as bytes and in another slot, goes on like it."""

    @PROPERTY
    @given(seeds, st.integers(1, 4), st.sampled_from(VOCABULARIES))
    def check(seed: int, before: int, vocabulary: int) -> None:
        rng = np.random.default_rng(seed)
        requests = [random_request(rng, name, vocabulary) for _ in range(3)]
        parents, children = (Step(given, clarification=(0, 1, 2)) for given in (requests, requests[::-1]))
        fed = torch.zeros(3, dtype=torch.int64)
        for position in range(10, 10 + before + 4):
            if position == 10 + before:
                for ring, other in zip(parents.remembers(), children.remembers(), strict=True):
                    for slot, its in zip(parents.slots, children.slots[::-1], strict=True):
                        other.from_bytes(its, ring.to_bytes(slot))
            # Nearly even rows, so that a sampler that forces tokens has reason to.
            logits, attention = random_logits(rng, 3, vocabulary) * 1e-3, random_attention(rng, 3)
            expected = parents.draw(logits, attention, position, fed)
            if position >= 10 + before:
                got = children.draw(logits.flip(0), attention.flip(1), position, fed.flip(0))
                for one, other in zip(got, expected, strict=True):
                    torch.testing.assert_close(one.flip(0), other, rtol=0, atol=0, equal_nan=True)
            fed = expected[0].argmax(-1)  # the forced one, where one is

    check()


def bounds_hold(name: str) -> None:
    """No plan is wider than the host was told."""

    @PROPERTY
    @given(seeds, st.integers(1, 6), st.sampled_from(VOCABULARIES))
    def check(seed: int, rows: int, vocabulary: int) -> None:
        rng = np.random.default_rng(seed)
        step = Step([random_request(rng, name, vocabulary) for _ in range(rows)])
        seen = step.spy(name)
        step.draw(random_logits(rng, rows, vocabulary), random_attention(rng, rows))
        [(_, plan)] = seen
        candidates, drawn = (
            torch.from_numpy(of[step.slots]) for of in (step.batch.sequences.most_candidates, step.batch.sequences.most_drawn)
        )
        assert (plan.parameters.top_k <= candidates).all()
        assert (plan.parameters.top_k <= drawn)[plan.parameters.samples > 1].all()
        assert set(plan.fields) <= {field.name for field in step.batch.samplers[name].fields}

    check()


def settings_are_written_and_read(name: str) -> None:
    """Every number's ends survive the way through an engine's configuration, and what lies beyond them is refused."""
    sampler, model = registry.registry().classes[name], registry.server_settings()
    assert model().sampler in registry.names()
    changes: list[dict[str, Any]] = [{}]
    for _, setting, low, high, kind in ranges(name):
        changes += [{setting: kind(low)}, {setting: kind(high)}]
        beyond = [kind(low - 1)] * (low > -GREATEST) + [kind(high + 1)] * (high < GREATEST)
        for value in (*beyond, "many", True):
            with pytest.raises(ConfigError, match=rf"{name}\.{setting} is "):
                model.from_dict({name: {setting: value}})
    for changed in changes:
        config = model.from_dict({"sampler": name, **({name: changed} if changed else {})})
        assert registry.load_server(config.model_dump(mode="json", by_alias=True)) == config
        assert type(config).model_validate_json(config.model_dump_json(by_alias=True)) == config
        made = registry.instances(config)[name]
        assert isinstance(made, sampler)
        assert changed.items() <= dict(made.numbers()).items()
    with pytest.raises(ConfigError, match="unknown setting"):
        model.from_dict({"no such setting" if sampler.Settings in model.__mro__ else name: {"no such setting": 1}})


def requests_set_their_own_numbers(name: str) -> None:
    """What a request sets reaches its row, and no other; the trace tells it."""
    for key, setting, low, high, kind in ranges(name):
        if key is None:  # it is called as what every request has
            continue
        requests = [Request(name), Request(name, said={key: kind(low)}), Request(name), Request(name, said={key: kind(high)})]
        step = Step(requests)
        seen = step.spy(name)
        step.draw(torch.zeros(4, 10), torch.zeros(4, 4))
        [(rows, _)] = seen
        sampler = step.batch.samplers[name]
        server = dict(sampler.numbers())[setting]
        expected = torch.tensor([server, low, server, high], dtype=torch.float32)
        assert torch.equal(rows.settings[setting], expected)
        told = sampler.described(registry.parse_request({"samplers": name, key: kind(high)}))
        assert getattr(told, setting) == high
        for value in ([kind(low - 1)] if low > -GREATEST else []) + ["many", True]:
            with pytest.raises(ConfigError, match=f"{key} is "):
                registry.parse_request({key: value}, {"sampler": name})
        # Meant for this sampler, and given to another.
        other = next(other for other in registry.names() if other not in (name, "chain"))
        with pytest.raises(ConfigError, match=f"{key} is a setting of the sampler {name}, but this request's is {other}"):
            registry.parse_request({"samplers": other, key: kind(low)}, {"sampler": name})


CHECKS: tuple[Callable[[str], None], ...] = (
    rows_do_not_influence_one_another,
    rows_are_distributions,
    strange_rows_degrade_alike,
    kernels_equal_pytorch,
    drafts_equal_steps,
    forks_continue_as_their_parents,
    bounds_hold,
    settings_are_written_and_read,
    requests_set_their_own_numbers,
)
