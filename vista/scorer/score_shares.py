"""Shares of the parts of a score, as `vista.scorer.explanation` describes them, computed by torch.

C items that are explained, N rows: these items, then the candidates that the mean is over. L events of a tail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Floats, Int
from vista.config.log_config import PASSIVE
from vista.config.model_config import ACTION, ITEM, PREVIOUS, is_action, is_category, parts_of
from vista.counters.counters import CounterSpec
from vista.errors import UnknownItemError
from vista.examples.item_spaces import NUM_POOLED, Pooled
from vista.examples.item_statistics import RECENT_DECAY
from vista.examples.transitions import SCALE
from vista.model import inference
from vista.model.attribution import attribute
from vista.model.serving_model import NEXT_TASK, UNKNOWN_ITEM, newest_first
from vista.model.target_attention import TargetContext
from vista.model.vista_model import VistaModel
from vista.scorer.explanation import PARTS, Explanation, Reason, about
from vista.scorer.request import Request
from vista.scorer.serving_snapshot import Call, ServingSnapshot

MOST_COMPARED = 1000
"""Candidates that the mean is over, at most: evenly spaced ones of longer lists and catalogs."""
MOST_REASONS, LEAST_OF_LARGEST = 3, 0.05
"""Most reasons of an item, and the least share of one, relative to the largest."""
LEAST_SIMILARITY = 0.2
"""Least cosine of two items of which reasons say that they go together."""
EXACT_COUNTS, EXACT_EVENTS = 10, 5
"""Counts, and ages in events, below which each has a code of its own."""
OFTEN = 0.2
"""Least share of an item's followers, shrunk as in `vista.examples.transitions`, of which reasons say that it often
comes right after the item. It takes three cases or more."""
RISING = 0.5
"""Standard deviations by which an item's events of 7 days exceed those of all time, relative to other items, if reasons
call it rising."""


def explained(call: Call, task: str, items: Any, candidates: Any, features: Any) -> Explanation:
    """What `Scorer.explain` returns for the one user of a request; arguments and errors are those of that."""
    snapshot, items_of_model = call.snapshot, call.snapshot.served.items
    snapshot.require_task(task)
    rows = call.rows(items, "items")
    if (unknown := rows == UNKNOWN_ITEM).any():
        raise UnknownItemError(
            f"items: the model does not know the item in place {int(unknown.argmax())}, so it has no score to explain; "
            "name items that the model was trained on"
        )
    if candidates is None:
        request = call.asked(features, None)
        joint = np.concatenate([rows, _evenly(np.arange(UNKNOWN_ITEM + 1, len(items_of_model) + 1))])
    else:
        chosen = call.rows(candidates)
        request = call.asked(features, len(chosen))
        index = np.concatenate([_places(rows, chosen), _evenly(np.arange(len(chosen)))])
        joint = chosen[index]
        if request.features is not None:
            request = replace(request, features=request.features.of_candidates(index))
    call.tally(candidates=len(rows))
    return _Scores(snapshot, request, task, joint, len(rows)).explanation()


def _evenly(values: Int) -> Int:
    """At most MOST_COMPARED of some values, evenly spaced."""
    return values[np.unique(np.linspace(0, len(values) - 1, MOST_COMPARED).astype(np.int64))] if len(values) else values


def _places(rows: Int, chosen: Int) -> Int:
    """The first place of each model row int64 [C] among candidates; ValueError if there are none, or one lacks."""
    if not len(chosen):
        raise ValueError("candidates: must name at least one item, whose scores the others are compared with")
    order = np.argsort(chosen, kind="stable")
    found = order[np.minimum(np.searchsorted(chosen[order], rows), len(chosen) - 1)]
    if (lacking := chosen[found] != rows).any():
        raise ValueError(f"items: the item in place {int(lacking.argmax())} is not one of the candidates")
    return found


class _Scores:
    """Scores of N rows for one user, and what they consist of."""

    def __init__(self, snapshot: ServingSnapshot, request: Request, task: str, joint: Int, count: int) -> None:
        """
        Args:
            request: of one user.
            joint: int64 [N] model rows of the items and of the candidates.
            count: C.
        """
        self.request, self.task, self.count = request, task, count
        self.scoring = snapshot.torch_scoring
        self.model: VistaModel = snapshot.model.with_adapter(request.adapter)
        self.rows = torch.from_numpy(joint).to(self.model.device)
        self.cosines: Tensor | None = None
        """float32 [N, J] with the pooled vectors."""
        self.pooled = self.scoring.pooled(request)
        if self.pooled is not None:
            pooled = self.pooled.expand(len(joint), -1, -1)
            self.cosines = inference.pooled_cosines(pooled, self.model.item_space[self.rows])
        self.codes: Tensor | None = None
        """uint8 [N, G * F + 1] counters."""
        if request.counters is not None:
            self.codes = torch.from_numpy(request.counters.of_items(joint)).to(self.model.device)
        model = self.model
        self.context: TargetContext = inference.request_context(
            model, request.summary, request.tail, users=request.users
        )
        self.seen = torch.full((1,), model.config.tail_len, device=model.device)

    @torch.no_grad()
    def explanation(self) -> Explanation:
        """The shares of the first C rows, and words for them."""
        value, parts, tail = self._of_next() if self.task == NEXT_TASK else self._of_task()
        valid = self.request.tail.valid[0]
        mean = float(value[self.count :].double().mean())
        shares = {name: self._centered(parts[name]) for name in PARTS if name in parts and name != "own"}
        own = value[: self.count].double().cpu().numpy()
        shares["own"] = own - mean - sum(shares.values(), np.zeros(self.count))
        events = self._centered(tail[:, valid])
        rows = self.rows[: self.count].cpu().numpy()
        counters = self.request.counters
        counts = np.zeros((self.count, 0), np.float32) if counters is None else counters.counts(rows)
        items = [self._id(row) for row in rows.tolist()]
        tail_items = [self._id(row) for row in self.request.tail.item[0][valid].tolist()]
        reasons: list[list[Reason]] = [[] for _ in rows]
        told = Explanation(items, own, mean, shares, events, tail_items, counts, reasons)
        words = _Words(self, told)
        for place, found in enumerate(reasons):
            best = sorted(((float(of_items[place]), part) for part, of_items in shares.items()), reverse=True)
            least = max(LEAST_OF_LARGEST * best[0][0], 0.005)  # a smaller share would be shown as 0.00
            found += [Reason(part, share, *words.of(part, place)) for share, part in best if share >= least]
            del found[MOST_REASONS:]
        return told

    def _id(self, row: int) -> Any:
        """Id of an item; None for the unknown one."""
        return None if row == UNKNOWN_ITEM else self.model.items.ids(np.array([row - 1])).tolist()[0]

    def _centered(self, shares: Tensor) -> Floats:
        """The first C of [N, ...], minus the mean over the others, float64."""
        exact = shares.double()
        centered: Floats = (exact[: self.count] - exact[self.count :].mean(0)).cpu().numpy()
        return centered

    def _of_next(self) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The scores [N] of `next`, the shares [N] of parts other than "own", and those of events [N, L].

        What the query token starts from (`VistaModel.request_parts`) counts as a share of the newest event, or of the
        item.
        """
        model, request, dim = self.model, self.request, self.model.config.dim
        gap = inference.request_gap(model, request.now, request.tail)
        assert self.scoring.retrieval is not None
        items = self.scoring.retrieval[self.rows] / model.temperature
        user = inference.user_vectors(model, self.context, gap, self.pooled)
        value: Tensor = items @ user[0]
        gain = 1.0 if model.statistics is None else model.statistics.gain

        def head(out: Tensor) -> Tensor:
            length = out.detach().square().sum(-1, keepdim=True).sqrt()
            # The model of epoch 0 has outputs of 0.
            return (gain * out / length.clamp(min=1e-12) * items[:, :dim]).sum(-1)

        tokens = [part.reshape(1, -1).expand(len(items), -1) for part in model.request_parts(self.seen, self.context)]
        read = attribute(model.target_attention, tokens, None if gap is None else gap[0], self.context, head)
        tail = read.tail.clone()
        tail[:, -1] += read.query[1]
        # Columns: what is added to the score of an item that is not counted, and what the head of counted items reads.
        parts = {"tail": tail.sum(1, keepdim=True), "own": read.query[0][:, None]}
        if model.config.num_seeds:
            parts["summary"] = read.summary.sum(1)[:, None]
        if self.cosines is not None:
            assert model.statistics is not None
            weights = model.statistics.weights(user[0, :dim])[-len(Pooled) :]
            for name, pooled in (("history", Pooled.all), ("recent", Pooled.recent)):
                cosine = self.cosines[:, pooled]
                parts[name] = torch.stack([weights[pooled] * cosine, cosine], 1)
        if model.counted is not None:
            products = (items * user)[:, dim + model.config.space_dim :].sum(1, keepdim=True)
            parts["popularity"] = torch.cat([products, model.item_statistics[self.rows]], 1)
        if (transitions := self.scoring.transitions(request)) is not None:
            sums = transitions.sums(self.rows)
            added = inference.transition_scores(user, sums)[0]
            parts["transitions"] = torch.cat([added[:, None], sums[0].t()], 1)
            value = value + added
        shares = {name: part[:, 0] for name, part in parts.items()}
        if self.codes is None or model.counted is None or request.counters is None:
            return value, shares, tail
        counted, codes = self.codes[:, 0] > 0, self.codes[:, :-1]
        num_events, gate = request.counters.num_events, model.counted.from_user(user[:, :dim])

        def score(given: Mapping[str, Tensor]) -> Tensor:
            """[n] of counted items whose counters may be hidden."""
            codes = given["counters"]
            total = sum(
                (part[:, 0] for name, part in given.items() if name != "counters"),
                torch.zeros(len(codes), device=codes.device),
            )
            if not codes.any():
                return total
            inputs = [
                given[name][:, 1:] for name in ("popularity", "transitions", "history", "recent") if name in given
            ]
            events = torch.from_numpy(num_events).to(total.device)
            assert model.counted is not None
            return model.counted.from_counters(codes[None], total[None], torch.cat(inputs, 1)[None], events)[0] + gate

        mean = {name: part[self.count :].mean(0, keepdim=True) for name, part in parts.items()}
        mean["counters"] = torch.zeros_like(codes[:1])
        own = {name: part[counted] for name, part in (parts | {"counters": codes}).items()}
        value[counted] = score(own)
        shares = {name: part[:, 0] - mean[name][:, 0] for name, part in parts.items()}
        shares["counters"] = torch.zeros_like(value)
        for name, of_counted in shapley(score, own, mean).items():
            shares[name] = shares[name].double().masked_scatter(counted, of_counted)
        return value, shares, tail

    def _of_task(self) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The logits [N] of a labeled task; others as of `_of_next`."""
        model, request, dim = self.model, self.request, self.model.config.dim
        assert model.task_head is not None
        features = None if request.features is None else request.features.rows  # one row, or one per candidate
        asked = inference.request_vectors(model, request.now, request.tail, features)
        asked = None if asked is None else asked[:, 0]
        index, added, network = model.schema.tasks.index(self.task), None, dict[str, Tensor]()
        if self.codes is not None:
            both = self.scoring.added_by(self.codes.cpu().numpy())
            added, network["counters"] = (both[:, :dim], both[:, dim:]), self.codes
        inputs = None
        if self.cosines is not None:
            inputs = model.candidate_inputs(self.cosines, self.rows)[None]
            widths = [1] * len(Pooled) + [model.item_statistics.shape[1], model.item_rates.shape[1]]
            names = ("history", "recent", "popularity", "rate")
            network |= dict(zip(names, torch.split(inputs[0], widths, 1), strict=True))
        vectors, weight = model.item_vectors(self.rows), model.task_head.weight[index : index + 1]
        of_pairs = None if asked is None else asked.expand_as(vectors)[None]
        codes = None if self.codes is None else self.codes[None]
        value = model.candidate_logits(vectors[None], of_pairs, self.seen, self.context, codes=codes, inputs=inputs)
        read = attribute(
            model.target_attention, [vectors], asked, self.context, lambda out: F.linear(out, weight)[:, 0], added
        )
        shares = {"tail": read.tail.sum(1)}
        if model.config.num_seeds:
            shares["summary"] = read.summary.sum(1)
        if network:

            def logit(given: Mapping[str, Tensor]) -> Tensor:
                of_items = [part for name, part in given.items() if name != "counters"]
                assert model.candidate_head is not None
                head = model.candidate_head.logits(given.get("counters"), torch.cat(of_items, 1) if of_items else None)
                return head[:, index]

            mean = {name: part[self.count :].float().mean(0, keepdim=True) for name, part in network.items()}
            if self.codes is not None:
                mean["counters"] = torch.zeros_like(self.codes[:1])
            shares |= shapley(logit, network, mean)
        if self.codes is not None:
            shares["counters"] = shares["counters"] + read.counters
        return value[0, :, index], shares, read.tail


def shapley(
    value: Callable[[Mapping[str, Tensor]], Tensor], given: Mapping[str, Tensor], absent: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Shapley values float64 [N] of parts: what each adds to a value, on average over all orders in which parts join.

    They add up to value(given) - value(absent).

    Args:
        value: of parts by name, [N, ...] each: [N].
        given: the parts that have joined; absent: what stands for each before, [1, ...].
    """
    names, num = list(given), len(given)
    hidden = {name: part.expand_as(given[name]) for name, part in absent.items() if name in given}
    worth = [
        value({name: (given if members >> bit & 1 else hidden)[name] for bit, name in enumerate(names)}).double()
        for members in range(1 << num)
    ]
    shares = {}
    for bit, name in enumerate(names):
        gains = [
            (worth[members | 1 << bit] - worth[members]) / (num * comb(num - 1, members.bit_count()))
            for members in range(1 << num)
            if not members >> bit & 1
        ]
        shares[name] = torch.stack(gains).sum(0)
    return shares


class _Words:
    """What reasons say, from the numbers of their parts."""

    def __init__(self, scores: _Scores, told: Explanation) -> None:
        self._model, self._told, self._task = scores.model, told, scores.task
        self._request, self._id = scores.request, scores._id
        self._rows = scores.rows.cpu().numpy()
        cosines = scores.cosines
        self._cosines = None if cosines is None else cosines.cpu().numpy()
        self._mean_cosines = None if self._cosines is None else self._cosines[scores.count :].mean(0)

    def of(self, part: str, place: int) -> tuple[str, list[Any]]:
        """The text about a part of an item, and the ids of items with which it ends."""
        texts: dict[str, Callable[[int], tuple[str, list[Any]]]] = {
            "counters": self._counters,
            "history": self._history,
            "recent": self._recent,
            "transitions": self._transitions,
            "popularity": self._popularity,
            "rate": self._rate,
            "tail": self._tail,
            "summary": lambda place: ("attention to the summary of the history", []),
            "own": lambda place: ("the item itself, at the time of the request", []),
        }
        return texts[part](place)

    def _counters(self, place: int) -> tuple[str, list[Any]]:
        spec = self._model.counter_spec
        assert spec is not None
        of_fields = np.split(self._told.counts[place], spec.num_fields)
        counted = list[tuple[str, NDArray[np.float32]]]()
        for field, own in zip(spec.fields, of_fields, strict=True):  # other keys count the same for all items
            if np.isfinite(own[0]) and any(part == ITEM or is_category(part) for part in parts_of(field)):
                counted.append((field, own))
        if not counted:
            return "not one of the items that the user had most often", []
        # The first key, the first one that depends on the request, and the first one of which actions are known.
        plain = [(field, own) for field, own in counted if not any(map(is_action, parts_of(field)))]
        said = plain[:1] + [one for one in plain[1:] if _CIRCUMSTANCES.keys() & parts_of(one[0])][:1]
        texts = [_counter_text(spec, field, own) for field, own in said]
        actions = _action_texts({field: float(own[0]) for field, own in counted}, self._task)
        return ", and ".join(texts + actions[:1]), []

    def _history(self, place: int) -> tuple[str, list[Any]]:
        counters = self._request.counters
        text = self._similarity("the whole history", Pooled.all, place)
        if counters is None:
            return text, []
        found = self._similar(counters.codes.key.astype(np.int64), place)
        return (f"{text}, such as" if found else text), found

    def _recent(self, place: int) -> tuple[str, list[Any]]:
        tail = self._request.tail
        found = self._similar(tail.item[0][tail.valid[0]][-NUM_POOLED:], place)
        text = self._similarity("the newest events", Pooled.recent, place)
        return (f"{text}, such as" if found else text), found

    def _similarity(self, what: str, pooled: Pooled, place: int) -> str:
        assert self._cosines is not None and self._mean_cosines is not None
        own, mean = float(self._cosines[place, pooled]), float(self._mean_cosines[pooled])
        verb = "goes with" if own > mean else "is unlike"
        if (task := self._model.schema.residual_task) is not None:
            verb = f"{task} is {'more' if own > mean else 'less'} likely after similar items of"
        return f"{verb} {what} (similarity {own:.2f}, on average {mean:.2f})"

    def _similar(self, rows: Int, place: int) -> list[Any]:
        """Ids of up to two items of model rows int64 [n] with vectors like that of the item, the most similar first."""
        rows = np.unique(rows[(rows != UNKNOWN_ITEM) & (rows != self._rows[place])])
        space = self._model.item_space
        own = space[int(self._rows[place])].double()
        cosines = (space[torch.from_numpy(rows).to(space.device)].double() @ own).cpu().numpy()
        best = np.argsort(-cosines, kind="stable")[:2]
        return [self._id(int(rows[each])) for each in best if cosines[each] >= LEAST_SIMILARITY]

    def _transitions(self, place: int) -> tuple[str, list[Any]]:
        table = self._model.transitions
        recent = torch.from_numpy(newest_first(self._request.tail.item)[0])
        assert table is not None
        follows = (table.item[recent.to(table.item.device)] == int(self._rows[place])).double()
        weight = (follows * table.weight[recent.to(table.item.device)].double()).sum(1).cpu()
        best = int((weight * RECENT_DECAY ** torch.arange(len(recent))).argmax()) if len(recent) else 0
        if not len(recent) or weight[best] <= 0:
            return "seldom comes right after the newest items", []
        verb = "often comes" if math.expm1(float(weight[best])) / SCALE >= OFTEN else "has come"
        return f"{verb} right after", [self._id(int(recent[best]))]

    def _popularity(self, place: int) -> tuple[str, list[Any]]:
        statistics = self._model.item_statistics[1:].cpu().numpy()
        own = statistics[int(self._rows[place]) - 1]
        below = int(100 * (statistics[:, 0] < own[0]).mean())
        text = f"more events than {below} % of all items" if below >= 50 else "fewer events than most items"
        # Columns as of `ItemStatistics`: all events, then events and first-time users of 30 and of 7 days.
        if len(own) > 1 and own[3] > own[0] + RISING:
            text += ", rising in the newest 7 days"
        return text, []

    def _rate(self, place: int) -> tuple[str, list[Any]]:
        index = self._model.schema.tasks.index(self._task)
        odds = float(self._model.item_rates[int(self._rows[place]), index].exp())
        return f"the odds of {self._task} are {odds:.1f} times those of all impressions", []

    def _tail(self, place: int) -> tuple[str, list[Any]]:
        shares = self._told.tail[place]
        best = int(shares.argmax()) if len(shares) else 0
        if not len(shares) or shares[best] <= 0 or self._told.tail_items[best] is None:
            return "attention to the newest events", []
        return "attention to the newest events, most of all to", [self._told.tail_items[best]]


_CIRCUMSTANCES = {
    "month": "in the same month",
    "weekday": "on the same weekday",
    PREVIOUS: "right after the newest item",
}
"""What parts of a counter's key that are not of the item say about its events."""


def _counter_text(spec: CounterSpec, field: str, values: NDArray[np.float32]) -> str:
    """A counter in words: "items of its brand 3 times before in the same month, last about 1 day ago".

    Counters are stored as codes (`encode_values`), so ages and large counts are approximate.
    """
    parts = parts_of(field)
    number = float(values[0])
    times = "once" if number < 1.5 else f"{'about ' * (number >= EXACT_COUNTS)}{number:,.0f} times"
    what = [] if ITEM in parts else [f"items of its {' and '.join(filter(is_category, parts))}"]
    when = [words for part, words in _CIRCUMSTANCES.items() if part in parts]
    return " ".join([*what, times, "before", *when]) + f", last {_age(spec, float(values[-1]))} ago"


def _action_texts(counts: dict[str, float], task: str) -> list[str]:
    """The task's action, else the most frequent one, of each key counted per action: "right in 3 of 4 events with it".
    Where impressions are events, their number is the second one.

    Args:
        counts: by field, of those that count the item.
    """
    by_key = dict[str, dict[str, float]]()
    for field, number in counts.items():
        parts = parts_of(field)
        if actions := [part for part in parts if is_action(part)]:
            key = "*".join(part for part in parts if part not in actions)
            by_key.setdefault(key, {})[actions[0].removeprefix(f"{ACTION}:")] = number
    texts = []
    for key, of_actions in by_key.items():
        parts, told = parts_of(key), task if task in of_actions else max(of_actions, key=of_actions.__getitem__)
        total, events = max(sum(of_actions.values()), counts.get(key, 0.0)), "events"
        if PASSIVE + told in of_actions:
            total, events = of_actions[told] + of_actions[PASSIVE + told], "impressions"
        what = ["with it"] if ITEM in parts else []
        if names := [*filter(is_category, filter(None, parts))]:
            what = [f"with items of its {' and '.join(names)}"]
        when = [words for part, words in _CIRCUMSTANCES.items() if part in parts]
        about = "about " * (total >= EXACT_COUNTS)
        texts.append(" ".join([f"{told} in {about}{of_actions[told]:,.0f} of {total:,.0f} {events}", *what, *when]))
    return texts


def _age(spec: CounterSpec, age: float) -> str:
    """The age of an event in words, from seconds, or from the number of later events."""
    if not spec.has_time:
        return f"{'about ' * (age >= EXACT_EVENTS)}{age:,.0f} event{'s' * (round(age) != 1)}"
    return about(age)
