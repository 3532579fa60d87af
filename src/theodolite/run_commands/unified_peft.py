"""``theodolite run unified-peft``."""

__all__ = ["command"]

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import InputError
from theodolite.run_commands._text_tables import is_text_model, read_texts
from theodolite.run_commands.shared import Memory, Seconds, chart, tell

_SHARE = 0.005  # of the model that each method may hold where no budget is given
_SEEDS, _PARTS = 3, ("train", "validation", "test")
_RATES = {"": (5e-4, 2e-3), "full": (5e-5, 2e-4)}


@subject_flags
def command(
    flags: SubjectFlags,
    method: Annotated[
        str | None, typer.Option(help="train this method: lora, mam, houlsby, prefix, scaled_parallel, bitfit, ...")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder to save the changes in; LoRA in the peft library's format")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="the most numbers that the changes hold, below 1 a share of the model")
    ] = None,
    steps: Annotated[int, typer.Option(help="training steps", min=1)] = 100,
    batch: Annotated[int, typer.Option(help="rows a step", min=1)] = 4,
    length: Annotated[int, typer.Option(help="tokens a row", min=8)] = 64,
    rate: Annotated[float, typer.Option(help="step size of AdamW")] = 1e-3,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Adapt a language model to texts by one --method and save what was trained; or compare methods as the survey does.

    With --target LABELS or --task classification, --data is a table of labelled texts: the model, an encoder or a decoder,
    gets a head for the classes. --epochs counts there and not --steps; methods are compared over three seeds.
    """
    if not rate > 0:
        raise InputError(f"--rate must be above 0, got {rate}")
    if (flags.target is not None or flags.task == "classification") and is_text_model(flags):
        if method is None and out is not None:
            raise InputError("--out goes with --method NAME; without it methods are compared and none is kept")
        found = _compare(flags, budget, batch, length) if method is None else None
        tell(found or _classify(flags, str(method), out, budget, batch, length, rate), as_json)
        return
    if method is None:
        if out is not None or budget is not None:
            raise InputError(
                "--out and --budget go with --method NAME; without it methods are compared and none is kept"
            )
        chart("unified-peft", flags, seconds, memory, as_json)
        return
    if flags.task not in (None, "language") or flags.subject is not None:
        raise InputError(
            "--method adapts a language model: give --model (smollm2, a Hugging Face folder or name) and --data (texts), with "
            "--task language or none"
        )
    tell(_adapt(flags, method, out, budget, steps, batch, length, rate, memory << 20), as_json)


def _adapt(
    flags: SubjectFlags, method: str, out: Path | None, budget: float | None, steps: int, batch: int, length: int, rate: float,
    memory: int,
) -> dict[str, Any]:  # fmt: skip
    import torch
    from torch.nn import functional as F

    from theodolite.core.capture import main_tensor
    from theodolite.core.estimate import bootstrap
    from theodolite.core.next_token import next_tokens
    from theodolite.language.subjects import language_subject
    from theodolite.parameters.peft import apply
    from theodolite.parameters.peft.comparison import train_steps

    subject = language_subject(
        flags.model or "smollm2", flags.data, column=flags.text or "text", length=length, seed=flags.seed
    )
    model, train, test = subject.predictor, subject.data.train.x, subject.data.test
    made = apply(model, method, budget=budget, seed=flags.seed)
    with made.disable():
        before = next_tokens(model, test.x, memory=memory).loss.mean(dim=1)
    order = torch.Generator().manual_seed(flags.seed)

    def loss(step: int) -> torch.Tensor:
        ids = train[torch.randint(len(train), (batch,), generator=order)]
        return F.cross_entropy(main_tensor(made(ids))[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    train_steps(made, loss, steps, learning_rate=rate)
    after = next_tokens(made, test.x, memory=memory).loss.mean(dim=1)
    texts, sizes = test.y.numpy(), made.parameter_count
    groups = texts if len(set(texts)) > 1 else None
    result: dict[str, Any] = {
        "model": subject.name,
        "method": method,
        "numbers_trained": sizes.method + sizes.head,
        "share_of_the_model": round(sizes.share_with_head, 6),
        "steps": steps,
        "test_loss_before": round(float(before.mean()), 4),
        "test_loss_after": round(float(after.mean()), 4),
        "gain_in_nats_a_token": str(bootstrap((before - after).double().numpy(), groups=groups, seed=flags.seed)),
        "test_texts": len(set(texts)),
    }
    return result | _saved(made, out, "model")


def _saved(made: Any, out: Path | None, onto: str) -> dict[str, Any]:
    """Save what was trained, and tell where it is and what it is put onto."""
    if out is None:
        return {}
    made.save(out)
    ours = f"theodolite.parameters.peft.PEFTModel.load({onto}, folder)"
    of_peft = (out / "adapter_config.json").exists()
    return {
        "saved_in": str(out),
        "read_with": f"peft.PeftModel.from_pretrained({onto}, folder), or {ours}" if of_peft else ours,
    }


def _task(flags: SubjectFlags, batch: int, length: int) -> Any:
    """The table as a task of classes, and what builds the model with a head for them."""
    from theodolite.parameters.finetuning_dimension import BuildTextClassifier
    from theodolite.parameters.peft import LabelledTexts

    data, parts = read_texts(flags, length)
    if data.task != "classification":
        raise InputError("methods are compared on texts with classes; the labels of this table are numbers")
    train, validation, test = ((part, part.pop("labels")) for part in map(parts.__getitem__, _PARTS))
    task = LabelledTexts(train, validation, test, batch_size=batch)
    return data, task, BuildTextClassifier(str(flags.model), len(data.classes))


def _classify(
    flags: SubjectFlags, method: str, out: Path | None, budget: float | None, batch: int, length: int, rate: float
) -> dict[str, Any]:
    from theodolite.core.estimate import proportion
    from theodolite.parameters.peft import apply

    data, task, build = _task(flags, batch, length)
    made, rows = apply(build(flags.seed), method, budget=budget, seed=flags.seed), len(data.test)
    epochs = flags.epochs or 3
    task.fit(made, epochs=epochs, learning_rate=rate, seed=flags.seed)
    sizes = made.parameter_count
    return {
        "model": str(flags.model),
        "method": method,
        "numbers_trained": sizes.method + sizes.head,
        "share_of_the_model": round(sizes.share_with_head, 6),
        "epochs": epochs,
        "test_accuracy": proportion(round(task.quality(made, "test") * rows), rows),
        "chance": round(data.chance, 4),
        "classes": list(data.classes),
    } | _saved(made, out, f"BuildTextClassifier({str(flags.model)!r}, {len(data.classes)})({flags.seed})")


def _compare(flags: SubjectFlags, budget: float | None, batch: int, length: int) -> dict[str, Any]:
    """Named methods and pairs that differ in one choice, trained at one budget, and what each choice was worth."""
    from theodolite.core.errors import ModelError
    from theodolite.core.estimate import mean_of_runs
    from theodolite.parameters.peft import Modification, apply, compare, design_effects

    data, task, build = _task(flags, batch, length)
    names = ("scaled_parallel", "parallel", "houlsby", "lora", "prefix", "mam", "bitfit", "head", "full")
    methods: dict[str, Any] = {name: name for name in names}
    methods |= {
        "sequential": Modification(insertion="sequential"),
        "parallel at attention": Modification(where="attention"),
    }
    left_out, sized = dict[str, str](), budget or _SHARE
    for name, method in list(methods.items()):  # whatever the model has no place for is known before any training
        try:
            apply(
                build(flags.seed), method, budget=None if name in ("bitfit", "head", "full") else sized, seed=flags.seed
            )
        except (InputError, ModelError) as error:
            left_out[name] = str(error)
            del methods[name]
    if not methods.keys() - {"bitfit", "head", "full"}:
        raise InputError(f"no method fits {flags.model} at a budget of {sized:g}: {next(iter(left_out.values()))}")

    def told(name: str, sized: object, seed: int, rate: float) -> None:
        print(f"training {name}, seed {seed}, step size {rate:g}", file=sys.stderr)

    found = compare(
        build, task, methods, budgets=(sized,), seeds=range(flags.seed, flags.seed + _SEEDS), epochs=flags.epochs or 3,
        learning_rates=_RATES, on_run=told,
    )  # fmt: skip
    result: dict[str, Any] = {
        f"{row['method']}, {row['parameters']:,} numbers beside the head": mean_of_runs(
            row["runs"], unit="accuracy", within=(0, 1)
        )
        for row in found.sort_values("quality", ascending=False).to_dict("records")
    }
    result |= {"chance": round(data.chance, 4), "classes": list(data.classes), "test_rows": len(data.test)}
    try:
        effects = design_effects(found).to_dict("records")
    except InputError:
        effects = []  # no two methods that are left differ in one choice
    for row in effects:
        low, high = row["interval"]
        result[f"worth of {row['level']}"] = f"{row['effect']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return result | {f"without {name}": why for name, why in left_out.items()}
