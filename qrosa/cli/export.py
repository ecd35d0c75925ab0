"""``qrosa export``: a run becomes a folder that others can load without qrosa."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrosa.cli.loading import base_option, choose_device, progress_bar
from qrosa.cli.options import (
    device_option,
    emit_json,
    force_option,
    json_option,
    progress_console,
    result_console,
)
from qrosa.config import read_yaml
from qrosa.errors import InputError
from qrosa.quantities import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

    from qrosa.data.encode import EncodedRow
    from qrosa.export.card import Drift
    from qrosa.export.hub import Pushed
    from qrosa.export.merge import ExportReport

_EXAMPLES = """\b
Examples:
  qrosa export run --output merged                              # fp16 safetensors for plain transformers
  qrosa export run --output merged --dtype bf16 --verify        # and measure what the export lost
  qrosa export run --output adapter-for-peft --format peft
  qrosa export run --output llama-cpp --format gguf --quant q8_0
  qrosa export run --output base-for-peft --base-only           # the base that such an adapter goes on
  qrosa export run --output merged --push-to me/my-model        # and upload it, private; hf auth login comes first
"""


@click.command(epilog=_EXAMPLES)
@click.argument("source", metavar="RUN")
@click.option("--output", required=True, metavar="FOLDER", help="The folder to make; it appears whole or not at all.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["safetensors", "peft", "gguf"]),
    default="safetensors",
    show_default=True,
    help="A merged model, as safetensors or for llama.cpp, or the adapter for PEFT.",
)
@click.option("--dtype", type=click.Choice(["fp16", "bf16"]), help="Of the merged weights.  [default: fp16]")
@click.option("--quant", type=click.Choice(["f16", "q8_0"]), help="Of the matrices in a GGUF file.  [default: f16]")
@click.option(
    "--base",
    type=click.Choice(["nf4", "original"]),
    help="Merge into the 4-bit base that was trained on, or into the original weights.  [default: nf4]",
)
@click.option(
    "--base-only", is_flag=True, help="Leave the adapter out: the base, decoded, for adapters of --format peft."
)
@click.option("--verify", is_flag=True, help="Compare the export with the trained model on rows.")
@click.option("--data", metavar="FILE", help="Rows for --verify.  [default: the run's own, first 32]")
@click.option(
    "--push-to",
    metavar="REPO",
    help="Then upload the folder into this repository of the Hugging Face hub, NAME or OWNER/NAME.",
)
@click.option("--public", is_flag=True, help="Let everybody see the repository, if --push-to has to make it.")
@base_option
@device_option
@force_option
@json_option
def command(
    source: str,
    output: str,
    format_: str,
    dtype: str | None,
    quant: str | None,
    base: str | None,
    base_only: bool,
    verify: bool,
    data: str | None,
    push_to: str | None,
    public: bool,
    base_model: str | None,
    device: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Merge a run into a model that loads without qrosa.

    The weights are streamed: memory stays below 2 GB and three times the largest tensor, whatever the model. With
    --verify both models are loaded afterwards, one after the other, and the 16-bit model that the base was made of.
    """
    if data is not None and not verify:
        raise InputError("--data is only used by --verify", "add --verify, or leave out --data")
    if base_only and verify:
        raise InputError("--verify compares an adapter's export, and --base-only has none", "leave out one of the two")
    if public and push_to is None:
        raise InputError("--public is only used by --push-to", "add --push-to, or leave out --public")
    given = {"--dtype": dtype, "--quant": quant, "--base": base, "--base-only": base_only, "--verify": verify}
    _refuse(format_, [flag for flag, value in given.items() if value])
    repo = _checked_repo(push_to)
    console = progress_console()
    if format_ == "peft":
        from qrosa.export.peft import export_peft

        report, drift = export_peft(source, output, model=base_model, force=force), None
        _report(report, drift, _push(report, repo, public, console), as_json=as_json)
        return
    if format_ == "gguf" and verify:
        from qrosa.export.llama_cpp import require_llama_cpp

        require_llama_cpp()
    place = choose_device(device)
    rows = _verify_rows(source, data, base_model) if verify else []
    settings: dict[str, Any] = {"base": base or "nf4", "model": base_model, "force": force, "device": place}
    with progress_bar(console, f"writing {output}") as advance:
        if format_ == "gguf":
            from qrosa.export.gguf import export_gguf

            report = export_gguf(source, output, quant=quant or "f16", **settings, progress=advance)
        else:
            from qrosa.export.merge import merge

            report = merge(source, output, dtype=dtype or "fp16", base_only=base_only, **settings, progress=advance)
    drift = _verify(source, report, rows, base_model, place, console) if verify else None
    _report(report, drift, _push(report, repo, public, console), as_json=as_json)


def _checked_repo(repo: str | None) -> str | None:
    """The whole id of the repository to push to, if any.

    Raises:
        InputError: It cannot be pushed to.
    """
    if repo is None:
        return None
    from qrosa.export.hub import check_push

    return check_push(repo)


def _push(report: ExportReport, repo: str | None, public: bool, console: Console) -> Pushed | None:
    if repo is None:
        return None
    from qrosa.export.hub import push

    console.print(f"uploading {report.output} to {repo} ...", markup=False, soft_wrap=True)
    return push(Path(report.output), repo, public=public)


_FOREIGN = {
    "safetensors": {"--quant": "is for --format gguf"},
    "gguf": {
        "--dtype": "is for --format safetensors; --quant is GGUF's",
        "--base-only": "is for --format safetensors",
    },
    "peft": dict.fromkeys(
        ("--dtype", "--quant", "--base", "--base-only", "--verify"),
        "does not go with --format peft, which merges nothing",
    ),
}


def _refuse(format_: str, given: Sequence[str]) -> None:
    """Refuse flags that mean nothing for a format.

    Raises:
        InputError: There is one.
    """
    for flag in given:
        if flag in _FOREIGN[format_]:
            raise InputError(f"{flag} {_FOREIGN[format_][flag]}", f"leave out {flag}")


def _verify_rows(source: str, data: str | None, model: str | None) -> Sequence[EncodedRow]:
    """Rows to compare on, read before the export is written, so that a bad --data costs nothing.

    Models are compared on whatever the rows say, so a run's own may be pairs, and given ones of any kind.

    Raises:
        InputError: No rows are named, or none can be read.
    """
    from qrosa.data.dataset import EVAL_SPLITS, load_rows
    from qrosa.data.length import row_length
    from qrosa.eval.objectives import OBJECTIVES
    from qrosa.export.source import open_adapter
    from qrosa.export.verify import VERIFY_ROWS

    settings = _run_settings(Path(source))
    rows = data or settings.get("eval_data") or settings.get("data")
    if not rows:
        raise InputError(f"{source} does not name rows to verify on", "give some with --data")
    opened = open_adapter(source, model)
    seq_len = row_length(settings.get("seq_len"), getattr(opened.base_files.config, "max_position_embeddings", None))
    split = "train" if data is None and not settings.get("eval_data") else EVAL_SPLITS
    own = OBJECTIVES[str(settings.get("objective") or "sft")].answers
    every = [objective.answers for objective in OBJECTIVES.values()]
    refused: InputError | None = None
    for answers in dict.fromkeys((own, *every) if data else (own,)):
        try:
            found = load_rows(
                rows,
                opened.tokenizer(),
                seq_len=seq_len,
                train_on=str(settings.get("train_on") or "completion"),
                limit=VERIFY_ROWS,
                split=split,
                columns=settings.get("columns"),
                answers=answers,
            )
            return found.rows[:VERIFY_ROWS]
        except InputError as error:
            refused = refused or error
    assert refused is not None
    raise InputError(refused.message, refused.hint if data else "give rows to verify on with --data") from refused


def _run_settings(source: Path) -> dict[str, Any]:
    """The settings of the run that an adapter or a checkpoint came from, if it still lies in its run."""
    folders = (source, *source.resolve().parents[:2])
    path = next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)
    return {} if path is None else read_yaml(path)


def _verify(
    source: str, report: ExportReport, rows: Sequence[EncodedRow], model: str | None, device: str, console: Console
) -> Drift:
    from qrosa.export.card import write_card
    from qrosa.export.source import card_facts, open_adapter, original_folder
    from qrosa.export.verify import verify

    say = lambda text: console.print(f"{text} ...", markup=False)  # noqa: E731
    opened = open_adapter(source, model)
    original = original_folder(opened)
    drift = verify(source, report.output, rows, model=model, original=original, device=device, progress=say)
    facts = card_facts(opened, dtype=report.dtype, base=report.base, form=report.format)
    write_card(Path(report.output), facts, drift)
    return drift


def _report(report: ExportReport, drift: Drift | None, pushed: Pushed | None, *, as_json: bool) -> None:
    if as_json:
        import dataclasses

        emit_json({**dataclasses.asdict(report), "verify": drift, "pushed": pushed})
        return
    console = result_console()
    size = bytes_text(report.bytes)
    console.print(
        f"{report.output}: {report.tensors} tensors, {size} {report.dtype}, in {report.seconds:.1f} s", markup=False
    )
    if pushed is not None:
        console.print(f"uploaded: {pushed.url} (commit {pushed.commit[:12]})", markup=False, soft_wrap=True)
    if drift is None:
        return
    console.print(
        f"drift over {drift['rows']} rows, {drift['tokens']:,} tokens: same most likely token "
        f"{100 * drift['top1_agreement']:.2f}%, mean KL {drift['mean_kl']:.3g}, loss {drift['loss_trained']:.4f} -> "
        f"{drift['loss_exported']:.4f} ({drift['loss_difference']:+.4f})"
    )
    original = drift["original"]
    if original is not None:
        console.print(
            f"from the 16-bit model: same most likely token {100 * original['top1_agreement']:.2f}%, mean KL "
            f"{original['mean_kl']:.3g}, loss {original['loss']:.4f} -> {drift['loss_exported']:.4f}"
        )
