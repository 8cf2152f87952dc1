"""The commands of the `pinakes` command that work from file to file (see cluster/files.py)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from cluster.console import Json, Quiet, progress, show

app = typer.Typer()

Source = Annotated[str, typer.Argument(help="JSON lines (or TSV where passages are read); local, s3://, compressed.")]
Out = Annotated[str, typer.Option("--out", "-o", help="The file to write; put in place when it is whole.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Directory, URL or hub name of the model.")]
Config = Annotated[
    str | None, typer.Option("--config", "-c", help="Take what is not given from `questions` of this config.")
]
Tokeniser = Annotated[str | None, typer.Option(help="T5's tokeniser, for a FiD reader.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def _settings(config: str | None, **given: Any) -> Any:
    """Return QuestionsConfig of the config file, with what is given on the command line instead."""
    from pipelines.config import QuestionsConfig, load_config

    found = load_config(config).questions if config else QuestionsConfig()
    return found.model_copy(update={key: value for key, value in given.items() if value is not None})


def _needed(model: str | None, key: str) -> str:
    from pipelines.errors import ConfigError

    if model is None:
        raise ConfigError("which model to use is not clear", expected=f"--model, or questions.{key} in the --config")
    return model


@app.command(epilog="Example: pinakes rerank retrieved.jsonl -m checkpoints/reranker_multi_base -o reranked.jsonl")
def rerank(
    source: Source,
    model: Model,
    out: Out,
    form: Annotated[
        Literal["paq", "dpr", "reranked"],
        typer.Option(help="Of the output: PAQ's or DPR's retrieval result, or PAQ's prediction a question."),
    ] = "paq",
    depth: Annotated[int, typer.Option(min=1, help="Hits of a question that are scored.")] = 50,
    tokeniser: Annotated[str | None, typer.Option(help="Of a checkpoint released without one.")] = None,
    device: Device = "cpu",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rerank a file of retrieved QA pairs (PAQ's jsonl) or passages (DPR's json) and score it."""
    from cluster import files, summaries
    from pipelines.config import RerankConfig

    config = RerankConfig(checkpoint=model, depth=depth, tokeniser=tokeniser)
    result = files.rerank(source, config, out, form, device, progress(quiet))
    show(result, json_, summaries.scored_summary)


@app.command(epilog="Example: pinakes answer retrieved.json --reader checkpoints/dpr-reader -o answers.jsonl")
def answer(
    source: Source,
    reader: Annotated[str, typer.Option(help="A DPR reader, a FiD reader, or `stored` (the pairs' own answers).")],
    out: Out,
    tokeniser: Tokeniser = None,
    depth: Annotated[int, typer.Option(min=1, help="Hits of a question that are read.")] = 50,
    device: Device = "cpu",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer the questions of a retrieved file from its hits; exact match where answers are known."""
    from cluster import files, summaries

    result = files.answer(source, reader, tokeniser, out, depth, device, progress(quiet))
    show(result, json_, summaries.scored_summary)


@app.command(epilog="Example: pinakes rank psgs_w100.tsv -m checkpoints/passage_ranker_base -o ps.jsonl")
def rank(
    source: Source,
    out: Out,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A checkpoint, a TSV of id and score, or `dummy`.")
    ] = None,
    config: Config = None,
    device: Device = "cpu",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """PAQ: say how likely each passage is to be worth asking about."""
    from cluster import files, summaries

    ranker = _needed(_settings(config, ranker=model).ranker, "ranker")
    show(files.rank(source, ranker, out, device, progress(quiet)), json_, summaries.plain_summary)


@app.command(epilog="Example: pinakes extract ps.jsonl -m checkpoints/answer_extractor_nq_base -o ae.jsonl")
def extract(
    source: Source,
    out: Out,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="PAQ's extractor, or a spaCy pipeline or package.")
    ] = None,
    config: Config = None,
    device: Device = "cpu",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """PAQ: find the spans of each passage that questions could be asked about."""
    from cluster import files, summaries

    extractor = _needed(_settings(config, extractor=model).extractor, "extractor")
    show(files.extract(source, extractor, out, device, progress(quiet)), json_, summaries.plain_summary)


@app.command(epilog="Example: pinakes generate ae.jsonl -m checkpoints/qgen_multi_base -o qg.jsonl --per-span 4")
def generate(
    source: Source,
    out: Out,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The question generator.")] = None,
    config: Config = None,
    per_span: Annotated[int | None, typer.Option(min=1, max=4, help="Questions a span: 1 (L1, NE) or 4 (L4).")] = None,
    device: Device = "cpu",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """PAQ: write questions that the extracted spans answer."""
    from cluster import files, summaries

    found = _settings(config, generator=model, per_span=per_span)
    generator = _needed(found.generator, "generator")
    result = files.generate(source, generator, out, found.per_span, device, progress(quiet))
    show(result, json_, summaries.plain_summary)


@app.command(
    "filter",
    epilog="Example: pinakes filter qg.jsonl --reader checkpoints/fid_reader_nq_base --tokeniser checkpoints/t5 "
    "--root pinakes-data --name wikipedia-dpr -o filtered.jsonl",
)
def filter_(
    source: Source,
    out: Out,
    reader: Annotated[str | None, typer.Option(help="The reader; without one every pair counts as good.")] = None,
    tokeniser: Tokeniser = None,
    config: Config = None,
    root: Annotated[str, typer.Option(help="Root of the index.", envvar="PINAKES_ROOT")] = "pinakes-data",
    name: Annotated[str | None, typer.Option(help="Global: the index that evidence is retrieved from.")] = None,
    passages: Annotated[str | None, typer.Option(help="Local: the file the questions were made from.")] = None,
    device: Device = "cpu",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """PAQ: mark pairs consistent when a reader answers the question as it was meant; none is removed."""
    from cluster import files, summaries

    found = _settings(config, reader=reader, tokeniser=tokeniser)
    evidence = (root, name, passages)
    result = files.filter_questions(source, out, found.reader, found.tokeniser, evidence, device, progress(quiet))
    show(result, json_, summaries.plain_summary)


@app.command(epilog="Example: pinakes group filtered.jsonl --scores ps.jsonl -o final_qas.jsonl")
def group(
    source: Source,
    out: Out,
    scores: Annotated[str | None, typer.Option(help="The ranked passages, whose ps_score goes along.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """PAQ: put the answers of the same question together; the result is a corpus to `ingest`."""
    from cluster import files, summaries

    show(files.group(source, out, scores, progress(quiet)), json_, summaries.plain_summary)
