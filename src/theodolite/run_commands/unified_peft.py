"""``theodolite run unified-peft``."""

__all__ = ["command"]

from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import InputError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell


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
    """Adapt a language model to texts by one --method and save what was trained; or compare methods as the survey does."""
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
    if not rate > 0:
        raise InputError(f"--rate must be above 0, got {rate}")
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
    if out is not None:
        made.save(out)
        result["saved_in"] = str(out)
        result["read_with"] = (
            "peft.PeftModel.from_pretrained(model, folder), or theodolite.parameters.peft.PEFTModel.load(model, folder)"
            if (out / "adapter_config.json").exists()
            else "theodolite.parameters.peft.PEFTModel.load(model, folder)"
        )
    return result
