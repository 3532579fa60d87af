"""``theodolite run dsir``."""

__all__ = ["command"]

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from theodolite.commands import Dask, Json, Seed, SubjectFlags, Workers, executor_of
from theodolite.core.errors import InputError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell

_SHOWN = 10


def command(
    raw: Annotated[
        list[str] | None,
        typer.Option(
            help="files to select from: paths, patterns in quotes ('pile/*.jsonl') or s3:// addresses of .jsonl, .txt, "
            ".parquet (the first two also .gz, .bz2, .xz, .zst); repeatable"
        ),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="files of the texts that are wanted; repeatable")] = None,
    select: Annotated[int | None, typer.Option("--select", "-k", help="documents to select", min=0)] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="file (.jsonl; .txt or .parquet where --raw is) or folder to write the selected documents to"
        ),
    ] = None,
    text: Annotated[str, typer.Option(help="where JSON and Parquet hold the text")] = "text",
    method: Annotated[str, typer.Option(help="gumbel (sampling) or top_k (the largest weights)")] = "gumbel",
    ngrams: Annotated[int, typer.Option(help="longest n-gram", min=1)] = 2,
    buckets: Annotated[int, typer.Option(help="buckets that n-grams are hashed into", min=1)] = 10_000,
    min_words: Annotated[int, typer.Option(help="shorter documents are not selected", min=0)] = 100,
    normalize: Annotated[
        str, typer.Option(help="sum, as published, or per_token: log weights are divided by the number of words")
    ] = "sum",
    smoothing: Annotated[
        float, typer.Option(help="added to the target's counts; 1 where the target is small", min=0)
    ] = 0.0,
    separate_targets: Annotated[
        bool, typer.Option("--separate-targets", help="a share of the selection for each --target")
    ] = False,
    on_error: Annotated[
        str, typer.Option(help="what to do with documents that cannot be read: raise, or skip and count them")
    ] = "raise",
    work: Annotated[
        Path | None,
        typer.Option(
            help="folder that keeps the weights, so that a stopped run is continued; with --dask a shared one"
        ),
    ] = None,
    block: Annotated[int, typer.Option(help="MiB of a file that one task reads", min=1)] = 64,
    workers: Workers = None,
    dask: Dask = None,
    subject: Annotated[
        str | None, typer.Option(help="instead of --raw: a built-in language model, or package.module:function")
    ] = None,
    model: Annotated[str | None, typer.Option(help="with --data: a Hugging Face folder or name, or smollm2")] = None,
    data: Annotated[str | None, typer.Option(help="with --model: the texts that it is used on")] = None,
    seed: Seed = 0,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Select from --raw the --select documents that together look like --target; or chart a language model's texts."""
    if raw is None and target is None:
        flags = SubjectFlags(
            subject=subject or (None if data else "smollm2"),
            model=model,
            data=data,
            task="language" if data else None,
            text=text,
            seed=seed,
        )
        chart("dsir", flags, seconds, memory, as_json)
        return
    if not raw or not target or select is None:
        raise InputError("give --raw (files to select from), --target (texts that are wanted) and --select (how many)")
    if subject or model or data:
        raise InputError("--subject, --model and --data chart a language model; leave them out with --raw and --target")
    if on_error not in ("raise", "skip") or method not in ("gumbel", "top_k"):
        raise InputError(f"--on-error is raise or skip and --method gumbel or top_k; got {on_error!r} and {method!r}")
    from theodolite.core.parallel import open_pool
    from theodolite.data.importance_resampling import Corpus, HashedNgrams, ImportanceResampler
    from theodolite.data.importance_resampling.output import plan_output

    def corpus(files: list[str]) -> Corpus:
        return Corpus.from_files(files, text, block_bytes=block << 20, on_error=cast(Any, on_error))

    began = time.perf_counter()
    pile = corpus(raw)
    wanted = [corpus([one]) for one in target] if separate_targets else [corpus(target)]
    if out is not None:
        plan_output(pile, out, kept=wanted)  # what cannot be written is told before the long work
    # one pool for all passes, whose workers remember the n-grams that they have hashed
    with executor_of(workers, dask) as given, open_pool(given) as executor, _bars(hidden=as_json) as bars:
        made = ImportanceResampler(
            HashedNgrams(ngrams, buckets),
            smoothing=smoothing,
            min_words=min_words,
            normalize=cast(Any, normalize),
            separate_targets=separate_targets,
            executor=executor,
            seed=seed,
            folder=work,
            on_shard=_shower(bars),
        ).fit(pile, wanted if separate_targets else wanted[0])
        chosen = made.select(select, cast(Any, method))
        by_chance = made.select(select, "random")
        written = [] if out is None else made.write(chosen, out)
    gained = [feature for feature in chosen.top_features if feature.selected > feature.raw]
    lost = [feature for feature in chosen.top_features if feature.selected < feature.raw]
    result: dict[str, Any] = {
        "selected": len(chosen.indices),
        "may_be_selected": chosen.n_eligible,
        "left_out": dict(chosen.left_out) if as_json else _counted(chosen.left_out),
        "nats_closer_to_the_target": chosen.kl_reduction,
        "nats_closer_by_a_random_choice": by_chance.kl_reduction,
        "gained": [one.ngram for one in gained] if as_json else ", ".join(one.ngram for one in gained[:_SHOWN]),
        "lost": [one.ngram for one in lost] if as_json else ", ".join(one.ngram for one in reversed(lost[-_SHOWN:])),
        "share_that_the_largest_weights_give_too": chosen.overlap_with_top_k,
        "note": chosen.note,
        "seconds": round(time.perf_counter() - began, 1),
        "written": written if as_json else ", ".join(written[:3]) + (", ..." if len(written) > 3 else "") or "nothing",
    }
    if out is None and as_json:
        result["rows"] = chosen.indices.tolist()
    tell(result, as_json)


def _bars(*, hidden: bool) -> Progress:
    """A line for each pass, on stderr, so that what is printed can be piped."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True)


def _shower(bars: Progress) -> Callable[[str, int, int], None]:
    """Shows how many shards of a pass are done; of a pass that is made again the line starts again."""
    lines: dict[str, TaskID] = {}

    def show(what: str, done: int, of: int) -> None:
        if what not in lines:
            lines[what] = bars.add_task(what, total=of)
        bars.update(lines[what], completed=done, total=of)

    return show


def _counted(left_out: Any) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count) or "none"
