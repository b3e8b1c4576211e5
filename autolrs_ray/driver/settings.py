"""What a run is asked to do: the searcher's arguments, checked, and what Tune adds to them."""

from __future__ import annotations

import json
import math
from typing import Any

from ray.tune.search.sample import Domain, Float, LogUniform

from autolrs_ray.core.checks import require_bool, require_float, require_int, validate_interval
from autolrs_ray.core.policies import DEFAULT_INTERVALS, is_same_option, make_policy, options_of, rule_of
from autolrs_ray.core.policy import Policy
from autolrs_ray.core.race.policy import FEW
from autolrs_ray.core.workers import parse_workers
from autolrs_ray.driver.reports import ReportKeys

CONFIG_KEY = "autolrs"
LR_KEY = "lr"
REPORT_TIMEOUT_S, RESOURCE_TIMEOUT_S = 900.0, 60.0
"""What the searcher's options of these names are unless they are given."""


class RunSettings:
    """The settings of one run; AutoLRSSearch documents them. Metric, mode, interval and slots may be told by Tune later.

    Raises TypeError or ValueError, naming the value, for anything out of range.
    """

    def __init__(
        self,
        total_steps: int,
        policy: str,
        lr_interval: tuple[float, float] | str | None,
        metric: str | None,
        mode: str | None,
        time_attr: str,
        train_metric: str,
        averaged_metric: str | None,
        seed: int,
        slots: int | None,
        resume: bool | str,
        extend: bool,
        report_timeout_s: float,
        resource_timeout_s: float,
        workers: int | str | tuple[int, int],
        options: dict[str, Any],
    ) -> None:
        if mode not in (None, "min", "max"):
            raise ValueError(f'mode must be "min" or "max", got {mode!r}')
        if not isinstance(resume, bool) and resume != "auto":
            raise ValueError(f'resume must be False, True or "auto", got {resume!r}')
        require_bool("extend", extend)
        for name, key in (("metric", "val_loss" if metric is None else metric), ("time_attr", time_attr),
                          ("train_metric", train_metric),
                          ("averaged_metric", "averaged" if averaged_metric is None else averaged_metric)):  # fmt: skip
            if not isinstance(key, str) or not key:
                raise TypeError(f"{name} must be the name of a result key, got {key!r}")
        if slots is not None:
            require_int("slots", slots, 1)
        self.total_steps, self.policy_name, self.options = total_steps, policy, options
        self.lr_interval = None if lr_interval is None else validate_interval(lr_interval)
        self.metric, self.mode = metric, mode
        self.time_attr, self.train_metric, self._averaged_metric = time_attr, train_metric, averaged_metric
        self.seed, self.max_slots, self.resume, self.extend = seed, slots, resume, extend
        self.report_timeout_s = require_float("report_timeout_s", report_timeout_s, 0.0, math.inf, low_open=True)
        self.resource_timeout_s = require_float("resource_timeout_s", resource_timeout_s, 0.0, math.inf)
        self.least_workers, most = parse_workers(workers)
        self.most_units = None if most is None else most // self.least_workers
        self.asked_units = self.most_units or 1  # for which an autoscaler makes room, a trial
        self._resolve()  # bad options are to raise here, not minutes later
        self._kept: set[str] = set()  # options as a run that goes on was begun with, and not as they were given

    def _resolve(self) -> None:
        planned = self.build(1)
        self._resolved, self._rule = options_of(planned), rule_of(planned)

    def build(self, slots: int, total_steps: int | None = None) -> Policy:
        """The policy of this run, planned for `slots` (or fewer, where trials grow); total_steps: instead of the run's own."""
        options = dict(self.options)
        if self.policy_name == "paper" and self.mode == "max":
            options.setdefault("floor", None)  # nobody knows how high a metric can get
        total, slots = total_steps or self.total_steps, self.side_by_side(slots)
        return make_policy(self.policy_name, total, self.lr_interval, self.seed, slots, **options)

    @property
    def elastic(self) -> bool:
        """Whether trials grow into free slots."""
        return self.most_units != 1

    def cap_units(self, most: int) -> None:
        """No trial can use more units than `most`."""
        self.most_units = max(1, most if self.most_units is None else min(self.most_units, most))

    def side_by_side(self, slots: int) -> int:
        """Trials that the policy is to plan for on `slots` slots. Where trials grow, a race has its two in play, and no other
        runs ahead of its time but on slots that these cannot use."""
        if not self.elastic or self.policy_name != "anchored":
            return slots
        return min(slots, FEW, max(2, slots // self.most_units if self.most_units else 1))

    @property
    def loss_key(self) -> str:
        return self.metric or "val_loss"

    @property
    def keys(self) -> ReportKeys:
        averaged = self._averaged_metric or f"averaged_{self.loss_key.removeprefix('val_')}"
        return ReportKeys(self.time_attr, self.loss_key, self.train_metric, averaged)

    @property
    def sign(self) -> float:
        """Of the metric in a loss that is minimised."""
        return -1.0 if self.mode == "max" else 1.0

    def take_metric(self, metric: str | None, mode: str | None) -> None:
        """Set what the constructor left open; ValueError if it says otherwise."""
        for name, ours, theirs in (("metric", self.metric, metric), ("mode", self.mode, mode)):
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(f"two values for {name}: {ours!r} in AutoLRSSearch and {theirs!r} in TuneConfig")
        self.metric, self.mode = self.metric or metric, self.mode or mode
        self._resolve()
        self._resolved = options_of(self.build(1))  # a default may depend on the mode

    def take_interval(self, domain: Any) -> None:
        """Take the interval from `param_space["lr"]`; ValueError for what is none, or another than the constructor's."""
        if domain is None:
            return
        if not isinstance(domain, Domain):
            raise ValueError(
                f'param_space["{LR_KEY}"] = {domain!r} would be overwritten: leave it out, or give the interval as '
                "tune.loguniform(min_lr, max_lr)"
            )
        if not (isinstance(domain, Float) and isinstance(domain.sampler, LogUniform)):
            raise ValueError(
                f'param_space["{LR_KEY}"] must be tune.loguniform(min_lr, max_lr): it is taken as the interval of the '
                f"search; got {domain}"
            )
        interval = (float(domain.lower), float(domain.upper))
        if self.lr_interval not in (None, interval):
            raise ValueError(f'two intervals: lr_interval={self.lr_interval} and param_space["lr"]={interval}')
        self.lr_interval = validate_interval(interval)

    def cap_slots(self, most: int) -> None:
        self.max_slots = most if self.max_slots is None else min(self.max_slots, most)

    def describe(self) -> dict[str, Any]:
        """Everything that decides the run's course, as JSON values; options as they were resolved, and which were given."""
        interval = self.lr_interval or DEFAULT_INTERVALS[self.policy_name]
        given = {*self.options, *(["lr_interval"] if self.lr_interval else [])} - self._kept
        found = dict(
            total_steps=self.total_steps, policy=self.policy_name, lr_interval=interval, metric=self.loss_key,
            mode=self.mode or "min", time_attr=self.time_attr, train_metric=self.train_metric,
            averaged_metric=self.keys.averaged, seed=self.seed, options=self._resolved, given=sorted(given),
            rule=self._rule, slots=self.max_slots,
        )  # fmt: skip
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]

    def adopt(self, theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Go on with a run that was begun with the settings `theirs`: what was given neither then nor now stays as it was
        then, whatever this version's default is. Returns what else differs: name -> (then, now)."""
        ours = self.describe()
        before, now = ({**config, **config.get("options", {})} for config in (theirs, ours))
        given = {*ours["given"], *theirs.get("given", ())}
        options = {*ours["options"], *theirs.get("options", {}), "lr_interval"}
        kept = {name for name in options - given if name in now}  # one that there was not yet decided nothing
        fixed = {*ours} - {"options", "given", "rule", "slots"} | options
        changed = {name: (before.get(name), now.get(name)) for name in {**now, **before} if name in fixed - kept}
        changed = {name: pair for name, pair in changed.items() if not is_same_option(*pair)}
        if "policy" in changed:
            return {"policy": changed["policy"]}
        if not changed.keys() - {"total_steps"}:
            self.lr_interval = validate_interval(before["lr_interval"])
            self.options = {**{name: before[name] for name in kept - {"lr_interval"} if name in before}, **self.options}
            self._resolve()
            self._rule, self._kept = theirs.get("rule"), kept
        return changed
