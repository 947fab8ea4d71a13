"""Where the time goes, and what was tried against it; the figures in `speed.md` come from here.

python benchmarks/speed_profile.py stages      # shares of fit and predict
python benchmarks/speed_profile.py operators   # shares of the operators in predict
python benchmarks/speed_profile.py compiled    # the trunk through torch.compile
"""

from __future__ import annotations

import collections
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import click
import torch
from speed_systems import build, draw_texts, fitted, labels

import verbtune.backbone
import verbtune.classifier
import verbtune.compiled
import verbtune.first_opinion
from verbtune import Backbone, PromptClassifier

THREADS = click.option("--threads", default=2, show_default=True)
DTYPE = click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)


@click.group()
def main() -> None:
    """Where the time goes."""


class Stopwatch:
    """Seconds by stage; a stage does not count while another one runs inside it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.running = ["the rest"]
        self.since = clock()

    def turn(self) -> None:
        """Put what has passed down to the running stage."""
        now = self.clock()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is a stage from now on."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            self.running.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.turn()
                self.running.pop()

        return timed


@contextlib.contextmanager
def stages(backbone: Backbone, clock: Callable[[], float] = time.perf_counter) -> Iterator[Stopwatch]:
    """While open, the parts of fit and predict are timed."""
    watch = Stopwatch(clock)
    trunk = backbone.model.base_model
    parts = [
        ("compile the task", verbtune.classifier, "compile_task"),
        ("tokenize, lay out", verbtune.compiled, "encode"),
        ("pad to batches", verbtune.backbone, "collate"),
        ("embeddings, hooks, text means", Backbone, "word_scores"),
        ("the LM's head", backbone.model, "forward"),
        ("the trunk", trunk, "forward"),
        ("choose what the rows read", verbtune.first_opinion, "choose_reading"),
        ("fit the rows", verbtune.first_opinion, "fit_rows"),
    ]
    with contextlib.ExitStack() as stack:
        for stage, owner, name in parts:
            stack.enter_context(mock.patch.object(owner, name, watch.timed(stage, getattr(owner, name))))
        watch.since = clock()
        yield watch
        watch.turn()


@main.command("stages")
@THREADS
@DTYPE
@click.option("--rounds", default=3, show_default=True)
@click.option("--processor", is_flag=True, help="Processor time, for a busy machine; with one thread.")
def stages_command(threads: int, dtype: str, rounds: int, processor: bool) -> None:
    """Shares of the stages of fit and predict with the built-in masked LM: medians over the rounds."""
    clock = time.process_time if processor else time.perf_counter
    torch.set_num_threads(threads)
    backbone = Backbone.load("builtin/masked", device="cpu", dtype=dtype)
    texts = draw_texts("sentences", 1000, backbone.tokenizer)
    for n in (32, 1000):
        clf = PromptClassifier("sentiment", model=backbone, steps=0)
        for name, work in (
            ("fit", lambda n=n, clf=clf: clf.fit(texts[:n], labels(n))),
            ("predict", lambda n=n, clf=clf: clf.predict(texts[:n])),
        ):
            work()
            seen: dict[str, list[float]] = collections.defaultdict(list)
            for _ in range(rounds):
                with stages(backbone, clock) as watch:
                    work()
                total = sum(watch.seconds.values())
                seen["total"].append(total)
                for stage, seconds in watch.seconds.items():
                    seen[stage].append(seconds / total)
            shares = {stage: statistics.median(values) for stage, values in seen.items()}
            total = shares.pop("total")
            told = ", ".join(f"{stage} {share:.1%}" for stage, share in sorted(shares.items(), key=lambda x: -x[1]))
            click.echo(f"{name}, {n} texts: {total:.3f} s; {told}")


@main.command()
@THREADS
@DTYPE
def operators(threads: int, dtype: str) -> None:
    """Shares of the operators in predict of 1000 sentences."""
    torch.set_num_threads(threads)
    backbone = Backbone.load("builtin/masked", device="cpu", dtype=dtype)
    texts = draw_texts("sentences", 1000, backbone.tokenizer)
    clf = PromptClassifier("sentiment", model=backbone, steps=0).fit(texts[:32], labels(32))
    clf.predict(texts)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        clf.predict(texts)
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:12]:
        click.echo(f"{event.key:50} {event.self_cpu_time_total / total:6.1%} {event.count:6} calls")


@main.command()
@THREADS
@click.option("--rounds", default=3, show_default=True)
@click.option("--texts", "n", default=256, show_default=True)
def compiled(threads: int, rounds: int, n: int) -> None:
    """Time of predict with the trunk, or each of its layers, compiled for any shape; against the eager one."""
    torch.set_num_threads(threads)
    for kind in ("masked", "causal"):
        for dtype in (torch.float32, torch.bfloat16):
            for what in ("trunk", "layers"):
                try:
                    told = compile_and_compare(kind, dtype, what, rounds, n)
                except Exception as error:  # whether it works at all is what we want to know
                    told = f"fails: {type(error).__name__}: {str(error).splitlines()[0]}"
                click.echo(f"{kind}, {dtype}, {what}: {told}")


def compile_and_compare(kind: str, dtype: torch.dtype, what: str, rounds: int, n: int) -> str:
    """One trial, in a line; eager and compiled in turn."""
    base = build(kind, "small", "cpu")
    backbone = Backbone(base.model.to(dtype), base.tokenizer)
    texts = draw_texts("sentences", n, backbone.tokenizer)
    clf = fitted(backbone, texts)
    ask = functools.partial(clf.compiled_.infer, [{"text": text} for text in texts], clf.prompt_)
    plain = torch.cat(ask(), dim=1)
    torch.compiler.reset()
    stats = torch._dynamo.utils.counters["stats"]
    stats.clear()
    trunk = backbone.model.base_model
    layers = next(module for module in trunk.modules() if isinstance(module, torch.nn.ModuleList))
    modules = [trunk] if what == "trunk" else list(layers)
    compiled = [torch.compile(module.forward, dynamic=True) for module in modules]
    with use(modules, compiled):
        first = seconds(ask)
        results = torch.cat(ask(), dim=1)
    graphs = stats["unique_graphs"]
    gains = []
    for _ in range(rounds):
        eager = seconds(ask)
        with use(modules, compiled):
            gains.append(eager / seconds(ask))
    return (
        f"first call {first:.0f} s, later {statistics.median(gains):.2f} ({min(gains):.2f} … {max(gains):.2f}) x the "
        f"eager speed; {graphs} graphs, {stats['unique_graphs'] - graphs} more in {rounds} later calls; scores "
        f"and states at most {float((results - plain).abs().max()):.0e} apart"
    )


@contextlib.contextmanager
def use(modules: Sequence[torch.nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """While open, modules compute by other functions."""
    with contextlib.ExitStack() as stack:
        for module, forward in zip(modules, forwards, strict=True):
            stack.enter_context(mock.patch.object(module, "forward", forward))
        yield


def seconds(work: Callable[[], Any]) -> float:
    """Wall time."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
